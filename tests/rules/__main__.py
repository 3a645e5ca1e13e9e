"""`python -m tests.rules` writes docs/rules.md."""

from .reasons import PAGE, page

if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote {PAGE}")
