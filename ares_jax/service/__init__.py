"""The sampler as a service of its own: HTTP server, client, and how a command starts one."""
