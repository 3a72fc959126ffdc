"""One step: its plan, the launches, and what is done before and after them."""
