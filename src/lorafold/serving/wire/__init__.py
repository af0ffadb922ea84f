"""What goes over the wire: the types of requests, and the shapes of answers."""
