"""`probe bench`: what instrumentation costs and what pruning gains, measured on the user's own machine.

Every figure is a ratio of two ways to do the same work, which take turns in one process (`turns`). Their outputs are
compared before a number is made of their times (`equality`). `plain` holds the loops written by hand that the engine
is measured against; `rows` the measurements, one file per family; `suite` their names, targets and order.
"""
