"""Train SSD300 on the lists that `create_data_lists.py` wrote.

    python train.py --data-folder data

The defaults are the paper's schedule for PASCAL VOC 07 + 12 on one GPU. Press Ctrl-C to stop: the
iteration is finished, a checkpoint is written, and `--resume` goes on from it.
"""

import contextlib
import dataclasses
import os
import pathlib
import random
import signal
import threading
import time
from typing import Literal

import torch
import tyro
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from datasets import PascalVOCDataset, collate_fn
from model import SSD300, MultiBoxLoss
from utils import (
    UserError,
    check_at_least,
    choose_device,
    exit_on_user_error,
    load_checkpoint,
    make_folder,
    normalize,
    save_checkpoint,
)


@dataclasses.dataclass
class Parameters:
    """Train SSD300."""

    # --- data ---
    # Folder of the lists that create_data_lists.py wrote.
    data_folder: str = './data'
    # Change colours, zoom out, crop and flip at random. Leave it out only of a short run on images
    # that are plenty: on VOC it is worth 20 mAP (published: 52 to 58 without).
    augment: bool = True
    # Processes that read and augment images. One feeds about 250 images/s.
    workers: int = min(8, os.cpu_count() or 1)

    # --- model ---
    # Start from torchvision's ImageNet weights of VGG-16 (a download of 528 MB, once). Without
    # them 07 + 12 is too little to learn from: expect a much lower mAP.
    pretrained: bool = True

    # --- optimiser ---
    # sgd with momentum 0.9 is the paper's. adamw learns faster in short runs from scratch; give
    # it an lr of about 3e-4.
    optimizer: Literal['sgd', 'adamw'] = 'sgd'
    # Images an iteration. When you halve it: halve lr, double iterations, decay_lr_at and warmup.
    batch_size: int = 32
    # Learning rate after the warm-up (section 3 of the paper); biases learn at twice this rate, as
    # in its code.
    lr: float = 1e-3
    # Keeps weights small; biases are left alone.
    weight_decay: float = 5e-4
    # Numbers that the convolutions work in: bf16 halves time and memory where the device has it,
    # and auto takes it there. Weights and loss stay in float32. (A GPU's float32 convolutions round
    # their factors to TF32's 10 bits.)
    precision: Literal['auto', 'bf16', 'float32'] = 'auto'

    # --- schedule, in iterations of the batch above ---
    # Total, those before a resumed checkpoint included.
    iterations: int = 120_000
    # Iterations at which lr is divided by 10. The first drop brings about +2.5 mAP on VOC.
    decay_lr_at: tuple[int, ...] = (80_000, 100_000)
    # Iterations over which lr rises from 0: the loss is steep at the start.
    warmup: int = 1_000

    # --- bookkeeping ---
    # The checkpoint that is written.
    checkpoint: str = './checkpoint_ssd300.pth.tar'
    # A checkpoint to go on from.
    resume: str | None = None
    # Iterations between checkpoints; one is written at the end anyway.
    save_every: int = 2_000
    # Iterations between two reports. Reading the losses waits for the GPU, so not too few.
    print_freq: int = 20
    # Of the weights at the start, the order of the images and their augmentation. Sums on a GPU
    # are not always in the same order, so only on a CPU do two runs agree in every bit.
    seed: int = 0
    # cpu, cuda, cuda:1, ...; auto is the GPU where there is one.
    device: str = 'auto'


# What must not change for a resumed run to end as an unbroken one.
GOES_ON_ALIKE = ('batch_size', 'lr', 'weight_decay', 'precision', 'decay_lr_at', 'warmup', 'seed',
                 'augment')


# --------------------------------------------------------------------------------------------------
# Schedule and optimiser
# --------------------------------------------------------------------------------------------------


def get_lr(iteration, lr, warmup, decay_lr_at):
    """The learning rate of an iteration, counted from 0: a linear rise, then drops by 10."""
    if iteration < warmup:
        return lr * (iteration + 1) / warmup
    return lr * 0.1 ** sum(iteration >= drop for drop in decay_lr_at)


def make_optimizer(model, kind, weight_decay):
    """SGD or AdamW in two groups: biases at twice the rate and without weight decay.

    The rate itself is set before each step, as `rate_factor` times that of `get_lr()`.
    """
    biases = [p for name, p in model.named_parameters() if name.endswith('.bias')]
    others = [p for name, p in model.named_parameters() if not name.endswith('.bias')]
    groups = [{'params': others, 'rate_factor': 1., 'weight_decay': weight_decay},
              {'params': biases, 'rate_factor': 2., 'weight_decay': 0.}]
    if kind == 'adamw':
        return torch.optim.AdamW(groups, fused=True)
    return torch.optim.SGD(groups, lr=1e-3, momentum=0.9, fused=True)


def choose_precision(precision, device):
    """The dtype of the convolutions on a device: torch.bfloat16 or torch.float32."""
    if precision == 'auto' and device.type == 'cuda':
        precision = 'bf16' if torch.cuda.is_bf16_supported(including_emulation=False) else 'float32'
    elif precision == 'auto':
        # Without the instructions for it a processor is slower in bf16. Releases of PyTorch that
        # cannot say what a processor has stay with float32.
        abilities = getattr(torch.cpu, 'get_capabilities', dict)()
        precision = 'bf16' if abilities.get('avx512_bf16') else 'float32'
    return torch.bfloat16 if precision == 'bf16' else torch.float32


# --------------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------------


class ShuffledBatches:
    """The endless order of a run's images, as batches of (position in the run, image).

    Each pass over the data is a permutation that depends on the seed and the pass alone, so a run
    that starts at iteration k sees what an unbroken run sees from there on. A batch may hold the
    end of one pass and the beginning of the next.
    """

    def __init__(self, n_images, batch_size, seed, start, end):
        self.n_images, self.batch_size, self.seed = n_images, batch_size, seed
        self.start, self.end = start, end

    def __len__(self):
        return self.end - self.start

    def __iter__(self):
        current, order = None, None
        for iteration in range(self.start, self.end):
            batch = []
            for position in range(iteration * self.batch_size, (iteration + 1) * self.batch_size):
                epoch, place = divmod(position, self.n_images)
                if epoch != current:
                    current, order = epoch, list(range(self.n_images))
                    random.Random(f'{self.seed} {epoch}').shuffle(order)
                batch.append((position, order[place]))
            yield batch


class SeededItems(Dataset):
    """Items whose augmentation depends on the seed and on their position in the run alone.

    So neither the number of workers nor a resume changes what the network sees, and no two
    workers draw the same dice.
    """

    def __init__(self, dataset, seed):
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, key):
        position, i = key
        random.seed(f'{self.seed} {position}')
        return self.dataset[i]


def ignore_interrupt(worker_id):
    """Leave Ctrl-C to the main process, which still wants its iteration's batch."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def make_loader(dataset, batch_size, seed, start, end, workers, device):
    """The batches of iterations `start` to `end`, in their order."""
    return DataLoader(
        SeededItems(dataset, seed), collate_fn=collate_fn, num_workers=workers,
        batch_sampler=ShuffledBatches(len(dataset), batch_size, seed, start, end),
        pin_memory=device.type == 'cuda', worker_init_fn=ignore_interrupt)


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


class Report:
    """Losses are kept on the device and read, by the progress bar, all at once."""

    def __init__(self, start, end):
        self.bar = tqdm(initial=start, total=end, unit='it', dynamic_ncols=True)
        self.losses, self.n_images, self.since = [], 0, time.perf_counter()

    def add(self, conf_loss, loc_loss, n_images):
        """Note the loss parts of one iteration, without waiting for them."""
        self.losses.append(torch.stack([conf_loss.detach(), loc_loss.detach()]))
        self.n_images += n_images
        self.bar.update()

    def read(self, rate):
        """Show the means since the last reading; stop the run if one loss is not finite."""
        if not self.losses:
            return
        losses = torch.stack(self.losses).cpu()                         # (iterations, 2)
        for i, (conf, loc) in enumerate(losses.tolist(), self.bar.n - len(losses) + 1):
            if not torch.isfinite(torch.tensor([conf, loc])).all():
                raise UserError(f'the loss is not finite at iteration {i}, at a rate of {rate:.2g}:'
                                f' classification {conf}, localization {loc}; lower --lr or '
                                f'lengthen --warmup')
        conf, loc = losses.mean(dim=0).tolist()
        speed = self.n_images / (time.perf_counter() - self.since)
        self.bar.set_postfix_str(f'loss {conf + loc:.3f} = classes {conf:.3f} + boxes {loc:.3f}, '
                                 f'lr {rate:.2g}, {speed:.1f} images/s')
        self.losses, self.n_images, self.since = [], 0, time.perf_counter()


@contextlib.contextmanager
def interrupt_as_flag():
    """Within the block the first Ctrl-C only sets a flag, so that no step is torn apart.

    The second one interrupts at once, as always.
    """
    interrupted = threading.Event()

    def note(signum, frame):
        """Handle the first Ctrl-C."""
        interrupted.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def train(model, criterion, optimizer, loader, start, end, rate_of, dtype, print_freq,
          save_every, save):
    """Run the iterations from `start` to `end`.

    Args:
        loader: gives one batch an iteration.
        rate_of: function from an iteration to its learning rate.
        dtype: of the convolutions.
        save: function that writes a checkpoint, given the number of iterations done.

    Returns:
        The number of iterations done, `end` unless Ctrl-C came.
    """
    device = model.priors_cxcy.device
    report = Report(start, end)
    iteration = start
    with interrupt_as_flag() as interrupted, report.bar:
        for iteration, (images, boxes, labels, _) in enumerate(loader, start + 1):
            rate = rate_of(iteration - 1)
            for group in optimizer.param_groups:
                group['lr'] = rate * group['rate_factor']
            images = normalize(images.to(device, non_blocking=True))
            boxes = [some.to(device, non_blocking=True) for some in boxes]
            labels = [some.to(device, non_blocking=True) for some in labels]

            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                predicted_locs, predicted_scores = model(images)
            conf_loss, loc_loss = criterion.parts(predicted_locs, predicted_scores, boxes, labels)

            optimizer.zero_grad()
            (conf_loss + criterion.alpha * loc_loss).backward()
            optimizer.step()

            report.add(conf_loss, loc_loss, len(images))
            last = interrupted.is_set() or iteration == end
            if last or iteration % print_freq == 0 or iteration % save_every == 0:
                report.read(rate)
            if last or iteration % save_every == 0:
                save(iteration)
            if last:
                break
    return iteration


def print_schedule_notes(batch_size, iterations, decay_lr_at):
    """Say what the paper's schedule is for another batch, and warn of drops that never come."""
    paper = Parameters()
    if batch_size != paper.batch_size and decay_lr_at == paper.decay_lr_at:
        factor = paper.batch_size / batch_size
        drops = ' '.join(str(round(drop * factor)) for drop in paper.decay_lr_at)
        print(f'note: the schedule is for batches of {paper.batch_size}; with {batch_size} the '
              f'same is --iterations {round(paper.iterations * factor)} --decay-lr-at {drops} '
              f'--warmup {round(paper.warmup * factor)} --lr {paper.lr / factor:g}')
    for drop in decay_lr_at:
        if drop >= iterations:
            print(f'warning: the drop of the rate at {drop} never comes, the run ends at '
                  f'{iterations}; give --decay-lr-at')


@exit_on_user_error
def main(parameters):
    """Train as the parameters say, and write a checkpoint."""
    p = parameters
    check_at_least(1, iterations=p.iterations, batch_size=p.batch_size, save_every=p.save_every,
                   print_freq=p.print_freq)
    check_at_least(0, workers=p.workers, warmup=p.warmup)
    device = choose_device(p.device)
    dtype = choose_precision(p.precision, device)
    torch.backends.cudnn.allow_tf32 = True
    make_folder(pathlib.Path(p.checkpoint).parent)
    if pathlib.Path(p.checkpoint).is_dir():
        raise UserError(f'checkpoint {p.checkpoint} is a folder; give a file in it')
    dataset = PascalVOCDataset(p.data_folder, 'TRAIN', keep_difficult=True, augment=p.augment)
    if p.batch_size > len(dataset):
        raise UserError(f'batch_size is {p.batch_size}, but there are only {len(dataset)} training '
                        f'images; give a smaller --batch-size, or lists with more images')

    torch.manual_seed(p.seed)
    model = SSD300(len(dataset.label_map)).to(device, memory_format=torch.channels_last)
    model.label_map = dataset.label_map
    optimizer = make_optimizer(model, p.optimizer, p.weight_decay)
    start = 0
    if p.resume is not None:
        start = restore(p.resume, model, optimizer, dataclasses.asdict(p))
        if start >= p.iterations:
            raise UserError(f'{p.resume} has {start} iterations already; give more --iterations')
    elif p.pretrained:
        model.base.load_pretrained_layers()
    print(f'{device}, {str(dtype).removeprefix("torch.")}; {len(dataset)} images, '
          f'{len(dataset.label_map) - 1} classes, {p.workers} workers')
    print(f'iterations {start} to {p.iterations} of {p.batch_size} images '
          f'({p.iterations * p.batch_size / len(dataset):.1f} passes), {p.optimizer}, lr {p.lr:g}, '
          f'warm-up {p.warmup}, drops at {", ".join(map(str, p.decay_lr_at)) or "none"}')
    print_schedule_notes(p.batch_size, p.iterations, p.decay_lr_at)
    loader = make_loader(dataset, p.batch_size, p.seed, start, p.iterations, p.workers, device)

    def save(iteration):
        """Write all that a resumed run needs."""
        save_checkpoint(p.checkpoint, iteration=iteration, model=model.state_dict(),
                        optimizer=optimizer.state_dict(), label_map=model.label_map,
                        parameters=dataclasses.asdict(p))

    done = train(model, MultiBoxLoss(model.priors_cxcy).to(device), optimizer, loader, start,
                 p.iterations, lambda i: get_lr(i, p.lr, p.warmup, p.decay_lr_at), dtype,
                 p.print_freq, p.save_every, save)
    print(f'{done} iterations, written to {p.checkpoint}')
    if done < p.iterations:
        print(f'interrupted; go on with --resume {p.checkpoint}')


def restore(path, model, optimizer, settings):
    """Take over weights and optimiser of a checkpoint; returns its number of iterations.

    Args:
        settings: this run's parameters, by name, to compare with the checkpoint's.
    """
    checkpoint = load_checkpoint(path)
    missing = {'iteration', 'model', 'optimizer', 'label_map', 'parameters'} - checkpoint.keys()
    if missing:
        raise UserError(f'{path} has no {sorted(missing)}; give a checkpoint that train.py wrote')
    if checkpoint['label_map'] != model.label_map:
        raise UserError(f'{path} is for the classes {list(checkpoint["label_map"])[1:]}, the data '
                        f'for {list(model.label_map)[1:]}; give the checkpoint of this data set')
    before = checkpoint['parameters']
    if before['optimizer'] != settings['optimizer']:
        raise UserError(f'{path} was trained with {before["optimizer"]}; go on with the same '
                        f'--optimizer')
    for name in GOES_ON_ALIKE:
        if before.get(name) != settings[name]:
            print(f'note: {name} was {before.get(name)} and is {settings[name]} now, so this run '
                  f'will not end as an unbroken one')
    model.load_state_dict(checkpoint['model'])
    weight_decays = [group['weight_decay'] for group in optimizer.param_groups]
    optimizer.load_state_dict(checkpoint['optimizer'])
    for group, weight_decay in zip(optimizer.param_groups, weight_decays):
        group['weight_decay'] = weight_decay  # this run's, as every other parameter
    return checkpoint['iteration']


if __name__ == '__main__':
    main(tyro.cli(Parameters))
