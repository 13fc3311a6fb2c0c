"""``service:front``: HTTP and booster in processes of their own."""
