"""What a saved notebook shows in the panel's place where no kernel draws it."""

from __future__ import annotations

# Output beside output: JupyterLab writes "Error displaying widget" where the panel was, or goes on "Loading widget".
# Both are hidden, and so is the card as soon as the panel is there. Late, so that it does not flash up before. Where
# a notebook is not trusted its style is taken out and the card is simply shown.
RUN_CARD = """
<style>
.jp-OutputArea-child:has(.llmkit-run-card) { max-height: 0; overflow: hidden; animation: llmkit-run-card 0s 2.5s both; }
@keyframes llmkit-run-card { to { max-height: 300px; } }
.jp-OutputArea:has(.llmkit-panel) > .jp-OutputArea-child:has(.llmkit-run-card) { display: none; }
.jp-OutputArea-child:has(.llmkit-run-card) + .jp-OutputArea-child:not(:has(.llmkit-panel)) { display: none; }
.llmkit-run-card { padding: 10px 12px; border: 1px solid var(--jp-border-color2, #ddd); border-radius: 6px;
  border-left: 4px solid var(--jp-brand-color1, #1976d2); font-family: var(--jp-ui-font-family, sans-serif);
  color: var(--jp-ui-font-color1, #222); background: var(--jp-layout-color1, #fff); }
.llmkit-run-card code { background: none; }
</style>
<div class="llmkit-run-card"><b>The llmkit panel was here.</b> It lives as long as its kernel.
<div>Run this cell to see it again: your models and conversations are kept by the server.</div></div>
"""
