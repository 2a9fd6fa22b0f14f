"""The workspace's gates, checks and benchmarks as one command, ``dyn``.

``gates`` holds one module per rule, each a function from a workspace to findings; ``verbs`` holds one module per
command; ``bench`` holds one module per benchmark. Continuous integration, workflows and people run the same verbs.
"""
