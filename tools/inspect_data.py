"""Look into datasets: check files, see lengths of documents, decoded documents and samples, mixture of the next steps.

Give prefixes, or the run config that names them (then samples and mixture are those of the run).
"""

import argparse

from megagpt.data.document_samples import DocumentStream
from megagpt.data.indexed import IndexedDataset
from megagpt.data.inspection import (
    decoded_documents,
    decoded_sample,
    describe,
    describe_options,
    inspect_dataset,
    mixture_table,
)
from megagpt.data.mixture import MixedStream, Mixture, Samples
from megagpt.data.run_data import open_data
from megagpt.data.samples import SampleStream
from megagpt.data.tokenizer import Tokenizer
from megagpt.errors import ConfigError, DataError, run_command
from megagpt.plan import load_run_config
from megagpt.plan.config import RunConfig


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefixes", nargs="*", metavar="PREFIX", help="datasets: paths without .bin/.idx")
    parser.add_argument("--config", help="run config (YAML) whose datasets, tokenizer, samples and mixture are shown")
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", help="change keys of the run config")
    parser.add_argument("--tokenizer", metavar="PATH", help="for decoding (default: that of the run config)")
    parser.add_argument("--verify", action="store_true", help="read all files: compare checksums, look at each token")
    parser.add_argument("--documents", type=int, default=0, metavar="N", help="show N documents of each dataset")
    parser.add_argument("--samples", type=int, default=0, metavar="N", help="show N samples (with --config)")
    parser.add_argument("--steps", type=int, default=0, metavar="N", help="show the mixture of N steps (with --config)")
    parser.add_argument("--first-step", type=int, default=0, metavar="N", help="steps done before those shown")
    parser.add_argument("--global-batch-size", type=int, default=1, help="samples per step (default 1)")
    parser.add_argument("--html", metavar="FILE", help="write all of it as a page with plots, too")
    args = parser.parse_args()
    if bool(args.prefixes) == (args.config is not None):
        parser.error("give either prefixes or --config")
    if (args.samples or args.steps) and args.config is None:
        parser.error("samples and mixtures belong to a run; give its --config")
    if min(args.documents, args.samples, args.steps, args.first_step, args.global_batch_size - 1) < 0:
        parser.error("numbers cannot be negative")
    return args


def shown_sample(stream: Samples, index: int, tokenizer: Tokenizer) -> str:
    """A training sample of the run as text."""
    name = ""
    if isinstance(stream, MixedStream):
        origin = stream.mixture.origin(index)
        name = f"sample {index:,} of the run is from {stream.mixture.names[origin.dataset]}: "
        stream, index = stream.streams[origin.dataset], origin.number
    assert isinstance(stream, SampleStream | DocumentStream)
    dataset = stream.dataset
    assert isinstance(dataset, IndexedDataset)
    return name + "\n".join(decoded_sample(dataset, stream, index, tokenizer))


def run_texts(
    args: argparse.Namespace, run: RunConfig, tokenizer: Tokenizer | None
) -> tuple[list[tuple[str, str]], Mixture | None, int]:
    """What is shown of a run: (title, text) each, the mixture, and the samples behind the last step."""
    texts = []
    data = open_data(run.data, run.model.vocab_size, run.training.seq_length, run.training.seed)
    if args.steps and data.mixture is None:
        raise ConfigError("--steps shows a mixture, but the run has one dataset; leave it out")
    if args.steps and data.mixture is not None:
        table = mixture_table(data.mixture, args.first_step, args.steps, args.global_batch_size)
        texts.append(("Samples of each dataset per step", "\n".join(table)))
    if args.samples and (options := describe_options(run.data)):
        texts.append(("Sample options", "\n".join(options)))
    first = args.first_step * args.global_batch_size
    for index in range(first, first + args.samples):
        assert tokenizer is not None
        texts.append((f"Sample {index:,}", shown_sample(data.train, index, tokenizer)))
    return texts, data.mixture, (args.first_step + args.steps) * args.global_batch_size


def main() -> None:
    args = parse_arguments()
    run = None if args.config is None else load_run_config(args.config, args.set)
    path, prefixes = args.tokenizer, list(args.prefixes)
    if run is not None:
        path = path or run.data.tokenizer
        prefixes = [entry.prefix for entry in (*run.data.mixed, *run.data.validation, *run.data.test)]
        if not prefixes:
            raise ConfigError(f"{args.config}: data.prefix is not set, there is nothing to inspect; set it")
    if path is None and (args.documents or args.samples):
        raise DataError("texts need a tokenizer; give its path with --tokenizer")
    tokenizer = None if path is None else Tokenizer.load(path)
    vocab_size = None if tokenizer is None else tokenizer.vocab_size
    found, problems = [], []
    for prefix in prefixes:
        try:
            found.append(inspect_dataset(prefix, args.verify, vocab_size))
        except DataError as error:  # the others are worth a look all the same
            problems.append(str(error))
        else:
            print("\n".join(describe(found[-1])))
    if problems:
        raise DataError("\n".join(problems))
    texts, mixture, samples = ([], None, 0) if run is None else run_texts(args, run, tokenizer)
    for prefix in prefixes if args.documents else []:
        assert tokenizer is not None
        texts.append((f"Documents of {prefix}", "\n".join(decoded_documents(prefix, tokenizer, args.documents))))
    for title, text in texts:
        print(f"\n{title}\n{text}")
    if args.html:
        from megagpt.data.inspection_page import write_page

        write_page(args.html, found, texts, mixture, samples)
        print(f"\nwritten: {args.html}")


if __name__ == "__main__":
    run_command(main)
