"""The zoo: every model type that the engine prunes, as a tiny random model."""

from zoo import gemma, glm, llava, odd, qwen, tiles
from zoo.refused import REFUSED
from zoo.specimen import PROMPTS, Prompt, Specimen

ZOO: dict[str, Specimen] = {
    specimen.model_type: specimen
    for module in (llava, qwen, gemma, tiles, glm, odd)
    for specimen in module.SPECIMENS
}

__all__ = ["PROMPTS", "REFUSED", "ZOO", "Prompt", "Specimen"]
