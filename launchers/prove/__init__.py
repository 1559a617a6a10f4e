"""`crosstune prove`: a promise about runs, tried on the user's own config, with a report to keep.

Each proof trains with the real commands in processes of their own, in folders of its own. Not covered: several
machines; what is proven holds for the processes of this one.
"""
