"""The compiler: graphs, checks and plans; no algorithm and no model."""
