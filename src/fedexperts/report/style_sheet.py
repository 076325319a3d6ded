"""The page's style sheet: light, dark and print, and the colours of methods (Okabe and Ito, safe for
colour-blind readers; lightened on dark ground).
"""

STYLE_SHEET = """
:root{color-scheme:light dark;--ground:#fff;--raised:#f6f8fa;--ink:#1b2430;--soft:#5b6776;--rule:#dde3ea;
--accent:#0b5cad;--good:#e3f4ec;--good-ink:#0b5c3f;--warn:#fff4dc;--warn-rule:#e0a100;--heat:#1f6fb2;
--on-heat:#fff;--c0:#0072b2;--c1:#d55e00;--c2:#009e73;--c3:#b8528f;--c4:#c98a00;--c5:#3fa2dc;--c6:#6f7782;
--c7:#5f4bb6}
@media (prefers-color-scheme:dark){:root{--ground:#12171d;--raised:#1a2129;--ink:#e4e9ef;--soft:#9aa7b5;
--rule:#2d3743;--accent:#6cb2f2;--good:#153a2c;--good-ink:#8fe0bd;--warn:#3a2f12;--warn-rule:#d9a520;
--heat:#5db1f5;--on-heat:#0d1319;--c0:#4aa8e0;--c1:#f08a4b;--c2:#35c99b;--c3:#dd8fbd;--c4:#e8b84a;
--c5:#8fd0f7;--c6:#a3acb6;--c7:#a796f0}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--ground);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,"DejaVu Sans",sans-serif}
main,header.top{max-width:1180px;margin:0 auto;padding:0 24px}
header.top{padding-top:30px}
h1{font-size:26px;line-height:1.2;margin:0 0 6px;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:19px;margin:38px 0 10px;padding-bottom:5px;border-bottom:1px solid var(--rule)}
h3{font-size:15px;margin:20px 0 2px}
h4{font-size:13px;font-weight:600;margin:0 0 4px;overflow-wrap:anywhere}
p{margin:6px 0 10px;max-width:86ch}
p.ran{font-size:16px;margin-bottom:14px}
p.note{max-width:110ch}
p.note,figcaption,.soft{color:var(--soft);font-size:13px}
nav{margin:14px 0 0;font-size:13.5px}
nav a{color:var(--accent);text-decoration:none;margin-right:16px;white-space:nowrap}
nav a:hover{text-decoration:underline}
.box{border:1px solid var(--rule);border-left:4px solid var(--accent);border-radius:6px;
background:var(--raised);padding:9px 16px;margin:10px 0}
.box ul{margin:2px 0;padding-left:18px}
.box li{margin:3px 0}
.box.glance{font-size:16px}
.box.warn{border-left-color:var(--warn-rule);background:var(--warn)}
.box strong.head{display:block;font-size:13px;letter-spacing:.02em}
.box p{margin:3px 0;max-width:none}
.wide{overflow-x:auto;margin:8px 0 4px}
table{border-collapse:collapse;font-size:13.5px;font-variant-numeric:tabular-nums}
th,td{padding:5px 11px;border-bottom:1px solid var(--rule);text-align:left;vertical-align:baseline}
th{font-weight:600;font-size:12.5px;color:var(--soft);vertical-align:bottom;border-bottom-width:2px}
td.num,th.num{text-align:right}
td.num{white-space:nowrap}
td .std{color:var(--soft);font-size:12.5px}
td.best{background:var(--good);color:var(--good-ink);font-weight:700}
td.best .std{color:inherit;font-weight:400}
tbody tr:hover td:not(.best){background:var(--raised)}
td.text{max-width:60ch;overflow-wrap:break-word}
td.short{white-space:nowrap}
th.group{text-align:left;color:var(--ink);padding-top:14px;border-bottom-width:1px}
.headline table{width:100%;font-size:14.5px}
.headline td:first-child{font-weight:600}
figure{margin:0 0 16px}
.panels{display:flex;flex-wrap:wrap;gap:18px 26px;align-items:flex-start;margin-top:8px}
.panel{max-width:100%;overflow-x:auto}
.panel.bars-panel{flex:1 1 460px}
svg{display:block;max-width:100%;height:auto}
svg text{fill:var(--soft);font:11.5px system-ui,-apple-system,"Segoe UI",Roboto,Arial,"DejaVu Sans",
sans-serif;font-variant-numeric:tabular-nums}
svg text.axis{fill:var(--ink)}
svg text.in-cell{fill:var(--ink)}
svg text.zero{fill:var(--soft);opacity:.55}
svg text.on-dark{fill:var(--on-heat)}
.grid{stroke:var(--rule);stroke-width:1}
.line{fill:none;stroke:var(--c);stroke-width:2;stroke-linejoin:round}
.band{fill:var(--c);fill-opacity:.16}
.mark{fill:var(--c);stroke:var(--ground);stroke-width:.6}
.bar{fill:var(--c)}
.bar.pale{fill-opacity:.38}
.whisker{stroke:var(--ink);stroke-width:1.2}
.cell{fill:var(--heat)}
.cell.none{fill:none;stroke:var(--rule)}
.outline{fill:none;stroke:var(--c1);stroke-width:2}
.pixels{image-rendering:pixelated}
.s0{--c:var(--c0)}.s1{--c:var(--c1)}.s2{--c:var(--c2)}.s3{--c:var(--c3)}
.s4{--c:var(--c4)}.s5{--c:var(--c5)}.s6{--c:var(--c6)}.s7{--c:var(--c7)}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;font-size:13px;margin:6px 0}
.key{display:inline-flex;align-items:center;gap:6px}
.swatch{display:inline-block;width:11px;height:11px;border-radius:2px;background:var(--c)}
.scale{display:inline-flex;align-items:center;gap:8px;font-size:12.5px;color:var(--soft);margin:4px 0;
font-variant-numeric:tabular-nums}
.ramp{display:inline-block;width:130px;height:10px;border:1px solid var(--rule);border-radius:2px;
background:linear-gradient(to right,transparent,var(--heat))}
.bars{display:grid;grid-template-columns:max-content minmax(120px,1fr) max-content;gap:6px 12px;
align-items:center;font-size:13.5px}
.bar-name{max-width:30ch;overflow-wrap:anywhere}
.bar-track{display:flex;height:18px}
.bar-track i{background:var(--c);display:block;min-width:1px}
.bar-track i:last-child{border-radius:0 3px 3px 0}
.bar-end{font-variant-numeric:tabular-nums;text-align:right;white-space:nowrap}
details{margin:8px 0;border:1px solid var(--rule);border-radius:6px;padding:0 12px}
summary{cursor:pointer;padding:7px 2px;font-size:13.5px;color:var(--accent)}
details[open]{padding-bottom:8px}
caption{caption-side:top;text-align:left;color:var(--soft);font-size:13px;padding:2px 0 4px}
footer{max-width:1180px;margin:40px auto 0;padding:14px 24px 36px;color:var(--soft);font-size:12.5px}
@media (max-width:640px){main,header.top,footer{padding-left:14px;padding-right:14px}h1{font-size:22px}
.bars{grid-template-columns:1fr max-content}.bar-track{grid-column:1/-1;grid-row:auto;order:0}
.bar-name,.bar-end{font-size:13px}}
@media print{:root{color-scheme:light}body{font-size:11px}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}nav{display:none}
main,header.top{max-width:none;padding:0}
.panel,figure svg,tr{break-inside:avoid}
h2,h3,h4{break-after:avoid}.wide,.panel{overflow:visible}}
"""
