"""The planner's laboratory: recorded traces, a simulated fleet, rival policies, back-tests and reports."""
