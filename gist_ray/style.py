"""Style: the look of every page, in the reader's light or dark setting."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --page: #f7f8fa; --card: #ffffff; --line: #e1e5ea; --text: #1b2330;
  --soft: #5c6878; --before: #a9b4c2; --after: #2f6fde; --up: #15803d; --down: #b42318;
  --part0: #e0a100; --part1: #2f6fde; --part2: #c4559b; --part3: #1f9e77; --part4: #63a9ec; --part5: #d9541e;
  --part6: #7b5cd6; --part7: #8a6d3b; --part8: #b4bcc8; }
@media (prefers-color-scheme: dark) { :root { --page: #10141a; --card: #181e26; --line: #2b3441;
  --text: #e6eaf0; --soft: #98a4b5; --before: #596575; --after: #6ea2ff; --up: #4ade80; --down: #ff8a7a;
  --part0: #e3b341; --part1: #4d86ec; --part2: #d678b6; --part3: #3fb98f; --part4: #8cc3f7; --part5: #ef7a45;
  --part6: #a58bf0; --part7: #b3935a; --part8: #5b6676; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); line-height: 1.5;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 960px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 6px; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 0 0 12px; }
p { margin: 0 0 12px; } .intro { color: var(--soft); margin-bottom: 24px; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px;
  margin: 0 0 16px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 12px;
  margin: 0 0 16px; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 14px; }
.tile b { display: block; font-size: 23px; line-height: 1.3; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: 13px; }
.scroll { overflow-x: auto; } .tall { max-height: 560px; overflow-y: auto; font-size: 13px; }
.scroll + p { margin-top: 16px; }
.tall th { position: sticky; top: 0; background: var(--card); } table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: 6px 14px 6px 0; border-bottom: 1px solid var(--line); }
th, td { vertical-align: top; }
td { overflow-wrap: anywhere; max-width: 640px; } td:first-child { min-width: 130px; }
tr:last-child td { border-bottom: 0; } th { color: var(--soft); font-weight: 600; font-size: 13px; }
.number { text-align: right; font-variant-numeric: tabular-nums; } td.number { white-space: nowrap; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(280px, 1fr)); gap: 8px 24px; }
figure { margin: 0; } figcaption { font-weight: 600; font-size: 13px; }
figcaption span { color: var(--soft); font-weight: 400; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--text); font: 12px system-ui, sans-serif; }
svg .soft { fill: var(--soft); } svg .up { fill: var(--up); } svg .down { fill: var(--down); }
svg .before { fill: var(--before); } svg .after { fill: var(--after); } svg .grid { stroke: var(--line); }
svg .category { font-weight: 600; } svg .span { stroke-width: 3; stroke-opacity: .55; }
svg .span.up { stroke: var(--up); } svg .span.down { stroke: var(--down); } svg .span.soft { stroke: var(--soft); }
svg .mark { stroke: var(--down); stroke-dasharray: 4 3; }
svg .faint { stroke: var(--after); stroke-opacity: .3; } svg .curve { stroke: var(--after); stroke-width: 2; }
svg .over { fill-opacity: .6; } svg polyline { fill: none; stroke-linejoin: round; }
pre { margin: 0; overflow-x: auto; font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.legend span { color: var(--soft); font-size: 13px; margin-right: 14px; white-space: nowrap; }
.legend i { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 6px; }
.part0 { fill: var(--part0); background: var(--part0); } .part1 { fill: var(--part1); background: var(--part1); }
.part2 { fill: var(--part2); background: var(--part2); } .part3 { fill: var(--part3); background: var(--part3); }
.part4 { fill: var(--part4); background: var(--part4); } .part5 { fill: var(--part5); background: var(--part5); }
.part6 { fill: var(--part6); background: var(--part6); } .part7 { fill: var(--part7); background: var(--part7); }
.part8 { fill: var(--part8); background: var(--part8); }
"""
