"""Process host, discovery, request plane and event bus of the Dynamo serving stack."""
