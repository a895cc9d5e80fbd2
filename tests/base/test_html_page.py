"""Pages of HTML: nothing in a text is markup, and nothing is fetched."""

from __future__ import annotations

import base64
import hashlib
import json
import re

from megatron_hammer.base.html_page import data_of, escape, page_of, picture_of, table_of, visible

HOSTILE = '</script><img src=x onerror="alert(1)">&\u2028\u202e\x00\ud800金'


def test_hostile_texts_stay_texts() -> None:
    page = page_of(HOSTILE, [table_of([HOSTILE], [[HOSTILE]]), data_of("figures", {visible(HOSTILE): 1})], script="1;")
    text = page.decode()
    assert text.count("<img") == text.count("</script><") == 0 and text.count("</script>") == 2
    assert "\u202e" not in text
    data = re.search(r'id="figures">(.*?)</script>', text, re.DOTALL)
    assert data is not None and list(json.loads(data[1])) == [visible(HOSTILE)]
    assert escape("a\u202eb\x1b[2J") == "a\\u202eb\\u001b[2J" and escape("a\n中\t") == "a\n中\t"


def test_the_policy_admits_the_pages_own_script_alone_and_no_address() -> None:
    script = "document.title = '金';"
    page = page_of("x", [picture_of(b"\x89PNG", "p")], script=script).decode()
    assert '<div class="wide"><img' in page and ".wide img { max-width: none;" in page, "moved on a phone, not shrunk"
    own = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{own}'" in page
    assert f"<script>{script}</script>" in page and "script-src" not in page_of("x", []).decode()
    assert not re.search(
        r"(src|href)=\"(?!data:|#)|url\((?!#)|@import|//", re.sub("base64,[^\"]*|sha256-[^']*", "", page)
    )
    assert 'lang="zh-CN"' in page_of("x", [], "zh-CN").decode() and "width=device-width" in page
