"""What `probe sites` prints: the places where probes attach, and the module of the decoder behind each."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from probe.backbones import load
from probe.site import EDIT_SITES, Site

_SAID: dict[Site, str] = {
    Site.IMAGES: "the pictures, before they are cut into views",
    Site.ENCODER_LAYER_ATTENTION: "the attention rows of encoder layer i",
    Site.ENCODER_LAYER_AFTER_ATTENTION: "between attention and MLP of encoder layer i",
    Site.ENCODER_OUTPUT: "patch features of every view, before the projector",
    Site.PROJECTOR_OUTPUT: "projected patches of every view, before tiles are joined",
    Site.BEFORE_LM: "the assembled sequence, before layer 0",
    Site.LAYER_INPUT: "what enters layer i",
    Site.LAYER_ATTENTION: "the attention rows of layer i",
    Site.LAYER_AFTER_ATTENTION: "the residual stream between attention and MLP",
    Site.LAYER_OUTPUT: "what leaves layer i",
    Site.FINAL: "after the final norm; edits act from the next step on",
    Site.LOGITS: "rows of the answer through the head",
}


def render_sites(name: str) -> RenderableType:
    """Sites of a backbone with the names of its modules, as an nnsight probe spells them."""
    backbone = load(name)
    names = {id(module): path for path, module in backbone.lm.named_modules()}
    first, last = backbone.layers[0], len(backbone.layers) - 1
    encoder = backbone.encoder_layers[0] if backbone.encoder_layers else None
    names |= {id(module): path for path, module in backbone.named_modules() if id(module) not in names}

    def path(module: object) -> str:
        return names[id(module)].replace("layers.0", "layers[i]")

    behind = {
        Site.IMAGES: "pictures",
        Site.ENCODER_LAYER_ATTENTION: path(encoder.attention) if encoder else "",
        Site.ENCODER_LAYER_AFTER_ATTENTION: f"{path(encoder.pre_mlp_norm)}.input" if encoder else "",
        Site.ENCODER_OUTPUT: f"{path(backbone.projector)}.input" if backbone.projector else "",
        Site.PROJECTOR_OUTPUT: f"{path(backbone.projector)}.output" if backbone.projector else "",
        Site.BEFORE_LM: "inputs_embeds",
        Site.LAYER_INPUT: f"{path(first.layer)}.input",
        Site.LAYER_ATTENTION: path(first.attention),
        Site.LAYER_AFTER_ATTENTION: f"{path(first.pre_mlp_norm)}.input",
        Site.LAYER_OUTPUT: f"{path(first.layer)}.output",
        Site.FINAL: f"{names[id(backbone.final_norm)]}.output",
        Site.LOGITS: "head",
    }
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("site", "module, as nnsight spells it", "edits", "what it is"):
        table.add_column(column, overflow="fold")
    facts = backbone.facts
    refused = dict(facts.refused)
    for site, said in _SAID.items():
        if site.in_encoder and (not behind[site] or site in refused):
            continue
        cells = (str(site), behind[site], "yes" if site in EDIT_SITES else "", said)
        table.add_row(*(Text(cell) for cell in cells))
    return Group(
        Text(
            f"{facts.name}: layers i = 0..{last}, {facts.heads} heads, width {facts.width}, "
            f"vocabulary {facts.vocabulary}; encoder layers 0..{facts.encoder_layers - 1}"
        ),
        table,
    )
