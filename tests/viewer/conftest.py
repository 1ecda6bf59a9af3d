"""The browser's fixtures, for all tests of the page."""

from web_browser import browser, open_page

__all__ = ["browser", "open_page"]
