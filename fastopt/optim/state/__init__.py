"""States of the parameters: made, counted, stored, saved and loaded."""
