"""``service:front``: HTTP and the booster in processes of their own. Nothing outside of this package knows it."""
