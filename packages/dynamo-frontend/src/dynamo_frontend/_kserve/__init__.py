"""The KServe v2 inference protocol, as REST and as gRPC, over text completions."""
