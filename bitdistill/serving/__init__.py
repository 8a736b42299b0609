"""An HTTP server for one packed student (extra `serve`). Nothing here needs torch."""
