"""Ray: the connection and its nodes, what travels to them, and the trials that run there.

Where to find what:

    the cluster    connection, nodes, shipping
    trials         searcher, slots, group, worker
"""
