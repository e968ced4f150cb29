"""Train SSD300 on the lists that `create_data_lists.py` wrote.

    python train.py --data-folder data
    torchrun --nproc-per-node=8 train.py --data-folder data

The defaults are the paper's schedule for PASCAL VOC 07 + 12. Press Ctrl-C to stop: the iteration is
finished, a checkpoint is written, and the same command with `--resume auto` goes on from it, to the
same weights as an unbroken run. It does so after a power cut, too.
"""

import contextlib
import dataclasses
import functools
import math
import pathlib
import sys
from typing import Literal

import torch
import tyro

from datasets import (
    ImageCache,
    PascalVOCDataset,
    ShuffledBatches,
    batches_on,
    make_test_loader,
    make_train_loader,
)
from eval import find_average_precisions
from machine import (
    choose_precision,
    compile_or_not,
    default_workers,
    divide_over_processes,
    gather_from_processes,
    join_processes,
    n_processes,
    prepare_gpu,
    process_number,
    share_buffers,
    signals_as_flag,
    sum_over_processes,
    wait_for_processes,
)
from model import SSD300, MultiBoxLoss
from published import start_from_coco
from report import Report
from utils import (
    SIDE,
    UserError,
    check_at_least,
    exit_on_user_error,
    load_checkpoint,
    make_folder,
    normalize,
    remove_torn,
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
    # Processes that read and augment images, for each process that trains. One feeds about 250
    # images/s.
    workers: int = default_workers()
    # Keep the decoded images in memory that all processes share; VOC 07 + 12 needs 9 GB. Saves a
    # quarter of a worker's time.
    cache: bool = False

    # --- model ---

    # Start from trained weights. Without them 07 + 12 is too little to learn from: expect a much
    # lower mAP.
    pretrained: bool = True
    # Which ones. imagenet: torchvision's VGG-16 (a download of 528 MB, once), the paper's start.
    # coco: torchvision's whole SSD300 of COCO (136 MB), its priors and the scores of the classes
    # that COCO has among yours (all of VOC's) included. It needs a fraction of the schedule: try
    # --iterations 20000 --decay-lr-at 12000 16000.
    init: Literal['imagenet', 'coco'] = 'imagenet'

    # --- optimiser ---

    # sgd with momentum 0.9 is the paper's. adamw learns faster in short runs from scratch; give
    # it an lr of about 3e-4.
    optimizer: Literal['sgd', 'adamw'] = 'sgd'
    # Images an iteration, of all processes together. When you halve it: halve lr, double
    # iterations, decay_lr_at and warmup.
    batch_size: int = 32
    # Parts that a batch is worked on in, one after the other. The gradients are those of the whole
    # batch, in the memory of a part: halve the memory with 2 before you halve the batch.
    grad_accumulation: int = 1
    # Learning rate after the warm-up (section 3 of the paper); biases learn at twice this rate, as
    # in its code.
    lr: float = 1e-3
    # Keeps weights small; biases are left alone.
    weight_decay: float = 5e-4
    # Numbers that the convolutions work in: bf16 halves time and memory where the device has it,
    # and auto takes it there, on an older GPU fp16. Weights and loss stay in float32. (A GPU's
    # float32 convolutions round their factors to TF32's 10 bits.)
    precision: Literal['auto', 'bf16', 'fp16', 'float32'] = 'auto'
    # torch.compile of network and loss: a minute at the start for less memory traffic in each
    # step. auto is on for a GPU.
    compile: Literal['auto', 'on', 'off'] = 'auto'

    # --- schedule, in iterations of the batch above ---

    # Total, those before a resumed checkpoint included.
    iterations: int = 120_000
    # Iterations at which lr is divided by 10. The first drop brings about +2.5 mAP on VOC.
    decay_lr_at: tuple[int, ...] = (80_000, 100_000)
    # Iterations over which lr rises from 0: the loss is steep at the start.
    warmup: int = 1_000

    # --- bookkeeping ---

    # The checkpoint that is written. The one with the best mAP stands beside it, with .best in its
    # name; what a paper reports is the last.
    checkpoint: str = './checkpoint_ssd300.pth.tar'
    # A checkpoint to go on from. auto is the newest of this run that is whole, and the beginning
    # if there is none, so that one command both starts a run and goes on with it.
    resume: str | None = None
    # Iterations between checkpoints; one is written at the end anyway.
    save_every: int = 2_000
    # Iterations between evaluations on the TEST list, one at the end; 0: none.
    eval_every: int = 10_000
    # Folder of log.csv, TensorBoard's files and curves.png; none: beside the checkpoint, with _log
    # after its name.
    log_folder: str | None = None
    # Iterations between two rows of the log. Reading the losses waits for the GPU, so not too few.
    print_freq: int = 20
    # Of the weights at the start, the order of the images and their augmentation. A CPU repeats a
    # run in every bit. A GPU does not: cuDNN picks its algorithms by their time, and sums of
    # gradients that many threads add to are not always in the same order.
    seed: int = 0
    # cpu, cuda, cuda:1, ...; auto is the GPU where there is one.
    device: str = 'auto'


# What must not change for a resumed run to end as an unbroken one.
GOES_ON_ALIKE = ('batch_size', 'lr', 'weight_decay', 'precision', 'decay_lr_at', 'warmup', 'seed',
                 'augment', 'n_images')


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
    optimizer = torch.optim.SGD(groups, lr=1e-3, momentum=0.9, fused=True)
    # The momentum of a fused SGD is whatever was in memory if its first step is skipped, as a step
    # with gradients that are not finite is. From 0 it becomes the gradient, as it should.
    for parameter in model.parameters():
        optimizer.state[parameter]['momentum_buffer'] = torch.zeros_like(parameter)
    return optimizer


def make_scaler(dtype, device):
    """What scales the gradients in half precision, and in any skips steps that are not finite."""
    return torch.amp.GradScaler(device.type, init_scale=2. ** 16 if dtype == torch.float16 else 1.)


# --------------------------------------------------------------------------------------------------
# One step
# --------------------------------------------------------------------------------------------------


def find_gradients(network, criterion, scaler, dtype, n_parts, images, boxes, labels,
                   normalize=normalize):
    """Forward and backward pass of a batch, or of this process's share of it.

    Args:
        network: images to locs and scores; of several processes a DistributedDataParallel.
        criterion: a MultiBoxLoss.
        scaler: as from `make_scaler()`.
        dtype: of the convolutions.
        n_parts: that are worked on one after the other, to save memory.
        images: (N, 3, 300, 300) uint8.
        boxes, labels: for each image (O, 4), (O,).
        normalize: function from such images to the floats that the network takes.

    Returns:
        Classification and localization loss, scalars. Of several processes, the sums of theirs are
        the batch's; the gradients are the batch's in each.
    """
    # Matching needs no predictions, so the positives of the whole batch are known beforehand.
    true_cxcy, true_classes = criterion.match(boxes, labels)
    n_positives = sum_over_processes((true_classes > 0).sum())
    parts = list(zip(*(tensor.chunk(n_parts) for tensor in (images, true_cxcy, true_classes))))
    sums = []
    for number, (some_images, *targets) in enumerate(parts, 1):
        # Processes exchange gradients once a batch, when they are complete.
        several = n_processes() > 1 and number < len(parts)
        with network.no_sync() if several else contextlib.nullcontext():
            with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
                predicted_locs, predicted_scores = network(normalize(some_images))
            conf_loss, loc_loss = criterion.parts(predicted_locs, predicted_scores, *targets,
                                                  n_positives)
            loss = conf_loss + criterion.alpha * loc_loss
            # A loss that is infinite can have finite gradients. Not a number, it has none: what is
            # wrong in one part, of one process, shows in the gradients of all.
            loss = loss * torch.where(loss.isfinite(), 1., math.nan)
            # Processes exchange the mean of their gradients, where the sum is wanted.
            scaler.scale(loss * n_processes()).backward()
        sums.append(torch.stack([conf_loss, loc_loss]).detach())
    return torch.stack(sums).sum(dim=0).unbind()


def step_if_finite(optimizer, scaler, dtype):
    """Update the weights, unless a gradient is not finite; nothing waits for the device.

    Returns:
        Whether the step was taken, a scalar tensor.
    """
    scaler.unscale_(optimizer)
    gradients = [p.grad for group in optimizer.param_groups for p in group['params']]
    finite = torch.nn.utils.get_total_norm(gradients, norm_type=math.inf).isfinite()
    scaler.step(optimizer)
    # Half precision looks for the largest scale that does not overflow; any other has none.
    scaler.update(None if dtype == torch.float16 else 1.)
    return finite


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


def train(find_gradients, take_step, optimizer, batches, start, end, rate_of, report, print_freq,
          save_every, save, eval_every, validate):
    """Run the iterations from `start` to `end`.

    Args:
        find_gradients: function of images, boxes and labels that runs network, loss and backward
            pass; returns the two losses.
        take_step: function that updates the weights; returns whether it did.
        batches: images, boxes and labels of each iteration, on the device.
        rate_of: function from an iteration to its learning rate.
        report: a Report.
        save: function that writes a checkpoint, given the number of iterations done.
        validate: function that evaluates, given the same; returns an mAP.

    Returns:
        The number of iterations done, `end` unless somebody stopped the run.
    """
    iteration = start
    with signals_as_flag() as signalled:
        for iteration, (images, boxes, labels) in enumerate(batches, start + 1):
            rate = rate_of(iteration - 1)
            for group in optimizer.param_groups:
                group['lr'] = rate * group['rate_factor']

            optimizer.zero_grad()
            conf_loss, loc_loss = find_gradients(images, boxes, labels)
            finite = take_step()
            report.add(conf_loss, loc_loss, finite, len(images) * n_processes())

            last = iteration == end
            to_eval = eval_every and (last or iteration % eval_every == 0)
            to_save = last or to_eval or iteration % save_every == 0
            # Several processes agree to stop where they meet anyway.
            asked = signalled.is_set() and n_processes() == 1
            if to_save or asked or iteration % print_freq == 0 or report.is_settled(iteration):
                stop = report.read(iteration, rate, signalled.is_set())
                if stop or to_save:
                    save(iteration)
                if to_eval and (last or not stop):
                    report.add_mAP(validate(iteration))
                if stop:
                    break
                report.go_on()
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


def check(p):
    """A UserError for parameters that cannot be, before anything is read."""
    check_at_least(1, iterations=p.iterations, batch_size=p.batch_size, save_every=p.save_every,
                   print_freq=p.print_freq, grad_accumulation=p.grad_accumulation)
    check_at_least(0, workers=p.workers, warmup=p.warmup, eval_every=p.eval_every)
    n_shares = n_processes() * p.grad_accumulation
    if p.batch_size % n_shares:
        raise UserError(f'batch_size is {p.batch_size}, which {n_processes()} processes times '
                        f'{p.grad_accumulation} parts do not divide; give a --batch-size that '
                        f'{n_shares} divides')
    make_folder(pathlib.Path(p.checkpoint).parent)
    if pathlib.Path(p.checkpoint).is_dir():
        raise UserError(f'checkpoint {p.checkpoint} is a folder; give a file in it')
    for path in (p.checkpoint, beside(p.checkpoint, '.best')):
        remove_torn(path)


def describe_run(p, device, dtype, start, train_set, test_set):
    """The lines that say what a run will do."""
    processes = f' x {n_processes()} processes' if n_processes() > 1 else ''
    print(f'{device}{processes}, {str(dtype).removeprefix("torch.")}; {len(train_set)} images to '
          f'train on, {len(test_set)} to test on, {len(train_set.label_map) - 1} classes, '
          f'{p.workers} workers')
    print(f'iterations {start} to {p.iterations} of {p.batch_size} images '
          f'({p.iterations * p.batch_size / len(train_set):.1f} passes), {p.optimizer}, lr '
          f'{p.lr:g}, warm-up {p.warmup}, drops at {", ".join(map(str, p.decay_lr_at)) or "none"}')
    print_schedule_notes(p.batch_size, p.iterations, p.decay_lr_at)


def load_data(p):
    """The sets to train and to test on, as the parameters want them."""
    train_set = PascalVOCDataset(p.data_folder, 'TRAIN', keep_difficult=True, augment=p.augment)
    if p.batch_size > len(train_set):
        raise UserError(f'batch_size is {p.batch_size}, but there are only {len(train_set)} '
                        f'training images; give a smaller --batch-size, or lists with more images')
    if p.cache:
        train_set.cache = ImageCache(train_set.images)
    return train_set, PascalVOCDataset(p.data_folder, 'TEST', keep_difficult=True)


@exit_on_user_error
def main(parameters):
    """Train as the parameters say, and write checkpoints."""
    with join_processes(parameters.device) as device:
        finished = run(parameters, device)
    if not finished:
        sys.exit(1)  # so that `train.py && eval.py` does not evaluate half a run


def run(p, device):
    """Train on a device as the parameters `p` say."""
    check(p)
    dtype = choose_precision(p.precision, device)
    prepare_gpu()
    train_set, test_set = load_data(p)

    torch.manual_seed(p.seed)
    model = SSD300(len(train_set.label_map)).to(device, memory_format=torch.channels_last)
    model.label_map = train_set.label_map
    optimizer = make_optimizer(model, p.optimizer, p.weight_decay)
    scaler = make_scaler(dtype, device)
    settings = dataclasses.asdict(p) | {'precision': str(dtype).removeprefix('torch.'),
                                        'n_images': len(train_set)}
    start = load_start(p, settings, model, optimizer, scaler)
    is_first = process_number() == 0
    if is_first:
        describe_run(p, device, dtype, start, train_set, test_set)
    network, criterion = make_network_and_loss(p, model, device, dtype)
    batches = ShuffledBatches(len(train_set), p.batch_size, p.seed, start, p.iterations)
    loader = make_train_loader(train_set, batches, p.workers, device)
    eval_every = p.eval_every if len(test_set) else 0
    log_folder = p.log_folder or beside(p.checkpoint, '_log', keep_suffix=False)

    def save(iteration, path=p.checkpoint):
        """Write all that a resumed run needs."""
        if is_first:
            save_checkpoint(path, iteration=iteration, model=model.state_dict(),
                            optimizer=optimizer.state_dict(), scaler=scaler.state_dict(),
                            label_map=model.label_map, parameters=settings)

    def validate(iteration):
        """The mAP on the test list; the best one's checkpoint is kept."""
        _, mAP = find_average_precisions(make_test_loader(test_set, 32, p.workers, device), model)
        report.say(f'{iteration} iterations: mAP {mAP:.4f}')
        if mAP > report.best_mAP():
            save(iteration, beside(p.checkpoint, '.best'))
        report.show_images(model, test_set, iteration)
        return mAP

    with Report(log_folder, start, p.iterations, device,
                lambda i: [train_set.images[image] for _, image in batches.batch(i)]) as report:
        if start and eval_every and (start == p.iterations or start % eval_every == 0) \
                and report.lacks_mAP():
            report.add_mAP(validate(start))
            report.go_on()
        done = train(
            functools.partial(find_gradients, network, criterion, scaler, dtype,
                              p.grad_accumulation, normalize=model.normalize),
            functools.partial(step_if_finite, optimizer, scaler, dtype), optimizer,
            batches_on(device, loader), start, p.iterations,
            lambda i: get_lr(i, p.lr, p.warmup, p.decay_lr_at), report, p.print_freq, p.save_every,
            save, eval_every, validate)
    wait_for_processes()  # for the first one, which writes
    if is_first:
        print(f'{done} iterations, written to {p.checkpoint}; log and curves in {log_folder}')
        if done < p.iterations:
            print(f'stopped; go on with --resume {p.checkpoint}')
    return done == p.iterations


def make_network_and_loss(p, model, device, dtype):
    """What a step runs: the model and its loss, compiled and divided as the parameters want it."""
    criterion = MultiBoxLoss(model.priors_cxcy).to(device)  # priors that came with the weights
    n_images = p.batch_size // n_processes() // p.grad_accumulation
    network, criterion.parts = compile_or_not(
        p.compile, device, (model, criterion.parts),
        functools.partial(try_out, device, dtype, n_images))
    return divide_over_processes(network), criterion


def try_out(device, dtype, n_images, network, parts):
    """A forward and backward pass without data, so that what compiles does it now."""
    images = torch.zeros(n_images, 3, SIDE, SIDE, dtype=torch.uint8, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        locs, scores = network(normalize(images))
    classes = torch.zeros(scores.shape[:2], dtype=torch.int64, device=device)
    sum(parts(locs, scores, torch.full_like(locs, 0.5, dtype=torch.float32), classes,
              classes.sum())).backward()
    network.zero_grad()


# --------------------------------------------------------------------------------------------------
# Checkpoints to start from
# --------------------------------------------------------------------------------------------------


def beside(path, mark, keep_suffix=True):
    """A path beside a checkpoint: net.best.pth.tar of net.pth.tar; without the suffix net.best."""
    path = pathlib.Path(path)
    stem, dot, suffix = path.name.partition('.pt')
    return path.with_name(stem + mark + (dot + suffix if keep_suffix else ''))


def load_start(p, settings, model, optimizer, scaler):
    """Load the weights that the parameters name; returns the number of iterations done."""
    path = find_newest(p.checkpoint) if p.resume == 'auto' else p.resume
    if len(set(gather_from_processes(path))) > 1:
        raise UserError('the machines of this run find different checkpoints; put --checkpoint '
                        'into a folder that all of them share')
    if path is None:
        if process_number() == 0:  # the others get its weights
            load_pretrained(p, model)
        share_buffers(model)  # now, since the loss is made of the priors
        return 0
    start = restore(path, model, optimizer, scaler, settings)
    # A finished run that is told to go on, as a queue of jobs may do, has nothing left to do.
    if start > p.iterations or start == p.iterations and p.resume != 'auto':
        raise UserError(f'{path} has {start} iterations already; give more --iterations')
    return start


def load_pretrained(p, model):
    """Load the trained weights that the parameters name."""
    if p.pretrained and p.init == 'imagenet':
        model.base.load_pretrained_layers()
    elif p.pretrained:
        found = start_from_coco(model)
        print(f'{len(found)} of {model.n_classes - 1} classes start with what COCO knows of them: '
              f'{", ".join(found) or "none"}')


def find_newest(path):
    """Of a run's last and best checkpoint the one with more iterations, None if there is neither.

    One that cannot be read is passed over with a note.
    """
    found = []
    for candidate in (pathlib.Path(path), beside(path, '.best')):
        if candidate.exists():
            try:
                found.append((load_checkpoint(candidate).get('iteration', 0), str(candidate)))
            except UserError as error:
                if process_number() == 0:
                    print(f'note: {error}')
    return max(found, default=(0, None))[1]


def restore(path, model, optimizer, scaler, settings):
    """Take over weights and optimizer of a checkpoint; returns its number of iterations.

    Args:
        settings: this run's, by name, to compare with the checkpoint's.
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
        if before.get(name) != settings[name] and process_number() == 0:
            print(f'note: {name} was {before.get(name)} and is {settings[name]} now, so this run '
                  f'will not end as an unbroken one')
    model.load_state_dict(checkpoint['model'])
    weight_decays = [group['weight_decay'] for group in optimizer.param_groups]
    optimizer.load_state_dict(checkpoint['optimizer'])
    for group, weight_decay in zip(optimizer.param_groups, weight_decays):
        group['weight_decay'] = weight_decay  # this run's, as every other parameter
    if before.get('precision') == settings['precision'] and 'scaler' in checkpoint:
        scaler.load_state_dict(checkpoint['scaler'])
    return checkpoint['iteration']


if __name__ == '__main__':
    main(tyro.cli(Parameters))
