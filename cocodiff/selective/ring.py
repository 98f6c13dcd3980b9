from typing import Any


class SelectiveRing:
    def start(self, *a: Any) -> Any: ...
