"""The routes, by what they are for. Each `routes(server)` gives the router of one group."""
