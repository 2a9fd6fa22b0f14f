"""Contracts, wire codec and conformance kit of the Dynamo serving stack."""
