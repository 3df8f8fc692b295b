"""An OpenAI-compatible HTTP server around a `Service`. Needs the extra `serve`: FastAPI, uvicorn, Prometheus."""
