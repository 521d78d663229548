"""The look of the gallery's cards. Colours follow the page's own: light, dark or printed."""

STYLE = """<style>
.gallery { --line: color-mix(in srgb, CanvasText 16%, Canvas); --soft: color-mix(in srgb, CanvasText 66%, Canvas);
  --ok: light-dark(#1d7a3c, #6ed08b); --no: light-dark(#b3261e, #ff9a90); color: CanvasText; }
.gallery :is(p, figure, ul, h3) { margin: 0; padding: 0; max-width: none; }
.gallery small, .gallery .id, .gallery figcaption, .gallery .ticks { color: var(--soft); font-size: .78rem; }
.gallery .jump { display: flex; flex-wrap: wrap; gap: .15rem 1.2rem; margin: .4rem 0 1rem; font-size: .9rem; }
.gallery .slot { margin: 2rem 0 1rem; }
.gallery .slot h3 { padding-bottom: .2rem; border-bottom: 1px solid var(--line); font-size: 1.15rem; }
.gallery .slot h3 small { margin-left: .5rem; font-weight: 400; }
.gallery .shares { display: flex; flex-wrap: wrap; gap: .1rem .9rem; margin: .35rem 0 .6rem; font-size: .85rem; }
.gallery .grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); gap: .9rem; }
.gallery .card { display: flex; flex-direction: column; gap: .5rem; min-width: 0; padding: .7rem .8rem .8rem;
  border: 1px solid var(--line); border-radius: 10px; background: color-mix(in srgb, CanvasText 2.5%, Canvas); }
.gallery .rule { font-size: .82rem; font-weight: 600; overflow-wrap: anywhere; }
.gallery .rule .id { display: block; font-weight: 400; }
.gallery .top { display: flex; flex-wrap: wrap; gap: .5rem .7rem; align-items: center; }
.gallery .top figure.video { flex: 0 0 calc(50% - .4rem); }
.gallery .top figure.audio { flex: 1 1 100%; }
.gallery .top .question { flex: 1 1 7rem; }
.gallery video { display: block; width: 100%; border-radius: 6px; background: #000; }
.gallery audio { display: block; width: 100%; height: 2.2rem; }
.gallery .question { font-size: .92rem; font-weight: 600; }
.gallery img.strip { display: block; width: 100%; max-width: none; border-radius: 4px; }
.gallery .sound small { display: none; }
.gallery .sound:has(+ .sound) small, .gallery .sound + .sound small { display: block; }
.gallery .wave { display: block; width: 100%; height: 2.6rem; }
.gallery .wave path { fill: color-mix(in srgb, CanvasText 55%, Canvas); }
.gallery .ticks { display: flex; justify-content: space-between; margin-top: -.4rem; line-height: 1; }
.gallery .row { padding-top: .35rem; border-top: 1px solid var(--line); font-size: .85rem; }
.gallery .head { display: flex; flex-wrap: wrap; align-items: baseline; gap: 0 .4rem; }
.gallery .name { font-weight: 700; white-space: nowrap; }
.gallery .words { flex: 1 1 2rem; overflow-wrap: break-word; }
.gallery .unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
.gallery .dot { flex: none; display: inline-block; width: .7rem; height: .7rem; margin-right: .3rem; border-radius: 50%;
  background: var(--c); box-shadow: 0 0 0 1px color-mix(in srgb, CanvasText 40%, Canvas); }
.gallery .mark { margin-left: auto; font-weight: 700; white-space: nowrap; }
.gallery .mark.ok { color: var(--ok); }
.gallery .mark.part { color: color-mix(in srgb, CanvasText 70%, Canvas); }
.gallery .mark.no { color: var(--no); }
.gallery .track { position: relative; margin-top: .25rem; padding: 1px 0; border-radius: 3px; line-height: 1.15rem;
  background: repeating-linear-gradient(90deg, var(--line) 0 1px, transparent 1px calc(100% / var(--n)))
  color-mix(in srgb, CanvasText 3%, Canvas); }
.gallery .bar { box-sizing: border-box; margin: 1px 0; padding: 0 .25rem; overflow: hidden; border-radius: 3px;
  border-left: 3px solid var(--c); background: color-mix(in srgb, var(--c) 38%, Canvas); font-size: .75rem;
  white-space: nowrap; text-overflow: ellipsis; }
.gallery .bar.visual { border: 1px dashed var(--c); border-left: 3px solid var(--c);
  background: color-mix(in srgb, var(--c) 16%, Canvas); }
.gallery .panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(7.6rem, 1fr)); gap: .5rem; }
.gallery .frame { position: relative; }
.gallery .frame img { display: block; width: 100%; max-width: none; border-radius: 4px; }
.gallery .frame svg { position: absolute; inset: 0; width: 100%; height: 100%; }
.gallery .frame :is(path, rect) { fill: none; vector-effect: non-scaling-stroke; stroke-linejoin: round; }
.gallery .frame .case { stroke: #000; stroke-width: 3.5; }
.gallery .frame .true { stroke: #fff; stroke-width: 1.6; stroke-dasharray: 4 3; }
.gallery .frame .said { stroke: var(--c); stroke-width: 2; }
.gallery .frame path.said { fill: var(--c); fill-opacity: .45; }
.gallery .frame .point { fill: #fff; stroke: #000; stroke-width: 1.5; }
.gallery .note { position: absolute; left: 0; right: 0; bottom: 0; padding: .1rem .3rem; background: rgb(0 0 0 / .72);
  color: #fff; font-size: .78rem; text-align: center; border-radius: 0 0 4px 4px; }
.gallery .panel figcaption { display: flex; flex-wrap: wrap; align-items: baseline; color: inherit; line-height: 1.3; }
.gallery .why { margin-top: .2rem; font-size: .8rem; }
.gallery .why summary { color: var(--soft); }
.gallery .why li { margin-left: 1.1rem; }
@media (min-width: 700px) { .gallery .rule { min-height: 3.9rem; } }
</style>
"""
