"""Pages for a browser: runs side by side, and the search of a collection."""
