"""Closed-form search problems with known exact fronts, and a simulated clock to search them on."""
