"""`tokenprune show`: one image, with and without pruning."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenprune.cli.arguments import Parser, add_config_dir
from tokenprune.cli.mistakes import BadInput


def main(arguments: Sequence[str]) -> int:
    """Runs the command; the exit code."""
    parser = Parser("tokenprune show", description="One image, with and without pruning.")
    parser.add_argument("image", help="a picture that Pillow reads")
    parser.add_argument("question")
    parser.add_argument("overrides", nargs="*", help="as for eval: model=tiny strategy=fastv")
    parser.add_argument("--output", type=Path, help="where the kept-token picture goes")
    add_config_dir(parser)
    args = parser.parse_intermixed_args(arguments)
    if "://" in args.image:
        raise BadInput(
            f"show: expected the file of a picture, got the address {args.image!r}, and addresses "
            "are not fetched. Download it."
        )
    from PIL import Image

    from tokenprune.cli.checks import single_run

    config = single_run(args.overrides, args.config_dir)
    if config.strategy is None:
        raise BadInput("strategy: expected one that prunes, got 'none'. Choose strategy=fastv.")
    form = Image.registered_extensions().get((args.output or Path("x.png")).suffix.lower())
    if form not in Image.SAVE:
        raise BadInput(
            f"show: expected a picture file, got --output {str(args.output)!r}. Use a name that "
            "ends in .png or .jpg."
        )
    from tokenprune.data.images import read_image

    try:
        image = read_image(Path(args.image))  # as data sets do
    except ValueError as error:
        raise BadInput(
            f"show: expected a picture, got {args.image!r}: {error}. Give another."
        ) from error
    from tokenprune import cost
    from tokenprune.cli import prompt
    from tokenprune.cli.jobs import quiet
    from tokenprune.evaluation.generation import FirstToken, generate, pruned
    from tokenprune.evaluation.kept import kept_tokens
    from tokenprune.evaluation.loading import device_of
    from tokenprune.report import pictures
    from tokenprune.runs import results
    from tokenprune.runs.compose import called, fit_pruning
    from tokenprune.runs.sweeps import run_name

    with quiet():
        loaded = prompt.load(config, args.overrides)
        shape = cost.DecoderShape.from_config(loaded.model.config)
        pruning = fit_pruning(config, loaded.model)
        inputs = prompt.prompt(loaded, image, args.question)
        (whole,) = generate(loaded, inputs, config.max_new_tokens, FirstToken())
        with pruned(loaded, pruning) as trace:
            (part,) = generate(loaded, inputs, config.max_new_tokens, FirstToken())
    assert pruning is not None
    assert trace is not None
    strategy = called(pruning.strategy)
    if not trace.stages:
        raise BadInput(
            "show: expected a schedule that cuts and a model with visual tokens, got no cut. "
            "Choose another schedule."
        )
    num_visual = len(trace.places[0])
    lengths = trace.visual_lengths[:, 0].tolist()
    share = cost.flops(shape, lengths) / cost.flops(shape, [num_visual] * shape.num_layers)
    print(f"device          {device_of(loaded.model)}")
    print(f"question        {args.question}")
    print(f"unpruned        {whole}")
    print(f"{strategy:<15} {part}")
    print(f"visual tokens   {num_visual} -> {lengths[-1]}, {100 * share:.0f} % of the FLOPs")
    name = run_name([f"{Path(args.image).stem}-{strategy}"])
    output = args.output or Path("outputs") / "show" / f"{name}.png"
    kept = kept_tokens(trace, 0, num_visual)
    if kept["grids"]:
        picture = pictures.stages(image, **pictures.drawing(kept))
        results.write_image(output, picture, form)
        print(f"picture         {output}")
    else:
        print("picture         none: where this model's tokens sit in the image is unknown")
    return 0
