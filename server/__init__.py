"""`edge-moe serve`: HTTP APIs of other vendors over a Runtime. Needs the extra `serve`, which only app.py and run.py
import."""
