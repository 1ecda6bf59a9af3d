"""The page on which a score map is explored: its HTML, and the hosts that compute maps for it.

The page in ``page/`` is one for three hosts: a file that holds a map, a local server, and a static
site that runs the network in the browser. Nothing here knows networks or results.
"""
