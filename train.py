"""Train SSD300 on the lists that `create_data_lists.py` wrote.

    python train.py --data-folder data
    torchrun --nproc-per-node=8 train.py --data-folder data

The defaults are the paper's schedule for PASCAL VOC 07 + 12. Press Ctrl-C to stop: the iteration is
finished (several ranks finish those up to the next row of the log), a checkpoint is written, and
the same command with `--resume auto` resumes the run. On a CPU its final weights are those of an
uninterrupted one, on a GPU up to rounding. After a power failure it resumes from the last
checkpoint.
"""

import dataclasses
import os
import pathlib
import sys
from typing import Literal

import torch
import tyro

from datasets import PascalVOCDataset, ShuffledBatches, make_test_loader, make_train_loader
from eval import evaluate
from model import SSD300, SSD512, MultiBoxLoss
from support.batch_norm import add_batch_norm, is_norm
from support.checkpoints import (
    find_newest_checkpoint,
    restore,
    save_checkpoint,
    set_aside,
    sibling_path,
)
from support.compilation import compile_network_and_loss
from support.device import choose_precision, configure_gpu, move_for_training
from support.errors import (
    UserError,
    check_at_least,
    exit_on_user_error,
    make_folder,
    remove_stale_temporaries,
)
from support.gradient_scaling import make_scaler, nan_if_not_finite, step_if_finite
from support.image_cache import ImageCache
from support.processes import (
    all_gather,
    all_reduce_sum,
    barrier,
    broadcast_buffers,
    check_shared_memory,
    default_workers,
    get_rank,
    get_world_size,
    is_set_in_any_rank,
    process_group,
    stop_on_signal,
    synchronize_gradients,
    wrap_distributed,
)
from support.published import COCO_SCALES, download_coco, start_from, start_from_caffe_vgg
from support.training_log import ESTIMATE_AFTER, TrainingLog


@dataclasses.dataclass
class Parameters:
    """Train SSD300."""

    # --- data ---

    # Folder of the lists that create_data_lists.py wrote.
    data_folder: str = './data'
    # Change colors, zoom out, crop and flip at random. Turn it off only for a short run on very
    # many images: on VOC it is worth over 12 mAP (the paper: 65.5 with flips alone, 77.2 with all).
    augment: bool = True
    # Processes per rank that read and augment images. One feeds about 300 images/s.
    workers: int = dataclasses.field(default_factory=default_workers)
    # Keep the decoded images in memory that all processes share; VOC 07 + 12 needs 9 GB. Saves a
    # quarter of a worker's time.
    cache: bool = False

    # --- model ---

    # ssd512 takes larger images: better for small objects (published for VOC: 79.8 mAP, and 77.2
    # with ssd300), with 2.9 times the operations (measured on a CPU: 3.4 times the time of a step,
    # 2.2 times its memory).
    network: Literal['ssd300', 'ssd512'] = 'ssd300'
    # Start from pretrained weights. Without them 07 + 12 is too little to learn from: expect a
    # much lower mAP.
    pretrained: bool = True
    # Which ones. imagenet: torchvision's VGG-16 (a download of 528 MB, once).
    # caffe: the VGG-16 of the paper's code, with its image mean, from --weights. Published: +1 mAP.
    # coco: torchvision's whole SSD300 of COCO (136 MB), with its priors, and with the weights for
    # the scores of those of your classes that COCO has (all of VOC's). It needs a fraction of the
    # schedule: try --iterations 20000 --decay-lr-at 12000 16000.
    # checkpoint: the same with any SSD300 that detect.py reads, from --weights.
    init: Literal['imagenet', 'caffe', 'coco', 'checkpoint'] = 'imagenet'
    # File of the weights: for caffe, vgg16_reducedfc.pth of github.com/amdegroot/ssd.pytorch.
    weights: str | None = None
    # Batch normalization after each convolution of base and auxiliary layers, folded into them for
    # detection. Give it with --no-pretrained: the network learns slowly from random weights
    # otherwise. With pretrained, the start is torchvision's VGG-16 with batch normalization. Mean
    # and variance are those of each micro-batch of each rank, so give these 8 images or more.
    batch_norm: bool = False
    # Scales of the priors: the paper's for VOC, or the smaller ones for COCO, also for other small
    # objects. Weights of init coco and checkpoint bring their own.
    priors: Literal['voc', 'coco'] = 'voc'

    # --- optimizer ---

    # sgd with momentum 0.9 is the paper's. adamw learns faster in short runs from scratch; give
    # it an lr of about 3e-4.
    optimizer: Literal['sgd', 'adamw'] = 'sgd'
    # Images in an iteration, of all ranks together. When you halve it: halve lr, double
    # iterations, decay_lr_at and warmup.
    batch_size: int = 32
    # Micro-batches per batch and rank, processed one after the other. The gradients are those of
    # the whole batch (but see batch_norm), in the memory of a micro-batch: halve the memory with 2
    # before you halve the batch.
    grad_accumulation: int = 1
    # Learning rate after the warm-up (section 3 of the paper); twice that for biases, as in its
    # code.
    lr: float = 1e-3
    # Keeps weights small; biases have none.
    weight_decay: float = 5e-4
    # Mixed-precision dtype: bf16 halves time and memory where the device supports it, and auto
    # takes it there, on an older GPU fp16. Weights and loss stay in float32. (A GPU's float32
    # convolutions use TF32, with 10 bits of mantissa.)
    precision: Literal['auto', 'bf16', 'fp16', 'float32'] = 'auto'
    # torch.compile of network and loss: a minute at the start for less memory traffic in each
    # step. auto is on for a GPU.
    compile: Literal['auto', 'on', 'off'] = 'auto'

    # --- schedule, in iterations of the batch above ---

    # Total, those before a resumed checkpoint included.
    iterations: int = 120_000
    # Iterations at which lr is divided by 10. The first drop brings about +2.5 mAP on VOC.
    decay_lr_at: tuple[int, ...] = (80_000, 100_000)
    # Iterations over which lr rises from 0, unlike in the paper: the gradients are large at the
    # start.
    warmup: int = 1_000

    # --- bookkeeping ---

    # The checkpoint that is written. The one with the best mAP is next to it, with .best in its
    # name; papers report the last. Those of an earlier run get .earlier in their names.
    checkpoint: str = './checkpoint_ssd300.pth.tar'
    # A checkpoint to resume. auto is the newest readable one of this run, or a new start if there
    # is none, so that one command both starts a run and resumes it.
    resume: str | None = None
    # Iterations between checkpoints; one is written at the end anyway.
    save_every: int = 2_000
    # Iterations between evaluations on the TEST list, one at the end; 0: none.
    eval_every: int = 10_000
    # Folder of log.csv, TensorBoard's files and curves.png; none: next to the checkpoint, with
    # _log after its name.
    log_folder: str | None = None
    # Iterations between two rows of the log. Reading the losses waits for the GPU, so not too few.
    print_freq: int = 20
    # Of the initial weights, the order of the images and their augmentation. On a CPU a run is
    # repeatable bit by bit. On a GPU it is not: cuDNN picks the fastest algorithms by measuring
    # them, and atomic additions to gradients are not always in the same order.
    seed: int = 0
    # cpu, cuda, cuda:1, ...; auto is the GPU where there is one.
    device: str = 'auto'


NETWORKS = {'ssd300': SSD300, 'ssd512': SSD512}
# Images in a batch of an evaluation, per rank.
TEST_BATCH_SIZE = 32
# Parameters that must not change if a resumed run is to end with the weights of an uninterrupted
# one.
MUST_MATCH = ('batch_size', 'lr', 'weight_decay', 'precision', 'decay_lr_at', 'warmup', 'seed',
              'augment', 'n_images')


@exit_on_user_error
def main(parameters):
    """Train as the parameters say, and write checkpoints."""
    p = parameters
    with process_group(p.device) as device:
        check_parameters(p)
        log_folder = p.log_folder or sibling_path(p.checkpoint, '_log', keep_suffix=False)
        make_folder(log_folder)
        configure_gpu()
        dtype = choose_precision(p.precision, device)
        autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
        train_set, test_set = load_data_sets(p.data_folder, p.augment, p.batch_size, p.cache)

        torch.manual_seed(p.seed)
        model = NETWORKS[p.network](len(train_set.label_map))
        if p.batch_norm:
            add_batch_norm(model)
        if p.priors == 'coco':
            model.priors_cxcy = model.create_prior_boxes(COCO_SCALES[model.input_size])
        move_for_training(model, device)
        model.label_map = train_set.label_map
        optimizer = make_optimizer(model, p.optimizer, p.weight_decay)
        scaler = make_scaler(dtype, device)
        settings = dataclasses.asdict(p) | {'precision': str(dtype).removeprefix('torch.'),
                                            'n_images': len(train_set),
                                            'world_size': get_world_size()}
        start = load_start(p, model, optimizer, scaler, settings)
        train_set.resize_for(model)
        test_set.resize_for(model)
        schedule = Schedule(start, p.iterations, p.lr, p.warmup, p.decay_lr_at, p.print_freq,
                            p.save_every, p.eval_every if len(test_set) else 0)
        if get_rank() == 0:
            print_summary(p, device, dtype, start, train_set, test_set)

        criterion = MultiBoxLoss(model.priors_cxcy).to(device)  # the priors of the loaded weights
        network = compile_network_and_loss(
            p.compile, wrap_distributed(model), criterion, autocast,
            n_images=p.batch_size // (get_world_size() * p.grad_accumulation),
            size=model.input_size)
        batches = ShuffledBatches(len(train_set), p.batch_size, p.seed, start, p.iterations)
        train_loader = make_train_loader(train_set, batches, p.workers, device)
        test_loader = make_test_loader(test_set, TEST_BATCH_SIZE, p.workers, device)

        with TrainingLog(log_folder, start, p.iterations, device, batches,
                         train_set.images) as log:
            run = Run(model, optimizer, scaler, settings, p.checkpoint, test_loader, autocast, log)
            if start > 0 and schedule.is_evaluation_due(start) and log.lacks_mAP():
                run.evaluate(start)     # the run was interrupted in this evaluation
            with stop_on_signal() as stop_signal:
                iteration = train(network, criterion, optimizer, scaler, autocast, train_loader,
                                  p.grad_accumulation, schedule, run, stop_signal)
        barrier()   # until rank 0 has written its files
        if get_rank() == 0:
            print(f'{iteration} iterations, written to {p.checkpoint}; log and curves in '
                  f'{log_folder}')
            if iteration < p.iterations:
                print('stopped; resume with the same command and --resume auto')
    if iteration < p.iterations:
        sys.exit(1)     # so that `train.py && eval.py` does not evaluate half a run


def train(network, criterion, optimizer, scaler, autocast, train_loader, n_micro_batches, schedule,
          run, stop_signal):
    """Run the iterations of a schedule. Nothing waits for the device between two rows of the log.

    Args:
        network: `run.model`, as it is, or wrapped for several ranks and compiled.
        criterion: a MultiBoxLoss.
        scaler: as from `make_scaler()`.
        autocast: context of the forward pass.
        train_loader: iterable of this rank's share of each batch, as `datasets.collate_padded()`.
        n_micro_batches: that the share is processed in, one after the other.
        schedule: a Schedule.
        run: a Run.
        stop_signal: a threading.Event; if it is set in any rank, all stop at the next row.

    Returns:
        The number of iterations done, less than `schedule.end` after a stop signal.
    """
    device, iteration = criterion.priors_cxcy.device, schedule.start
    run.log.restart_clock()
    for iteration, batch in enumerate_or_save(train_loader, schedule.start, run):
        lr = get_lr(iteration - 1, schedule.lr, schedule.warmup, schedule.decay_lr_at)
        set_lr(optimizer, lr)

        images, boxes, labels = (tensor.to(device, non_blocking=True) for tensor in batch)
        n_images, n_positives = len(images) * get_world_size(), None
        if n_micro_batches * get_world_size() > 1:
            # The loss is divided by the number of positive priors (matched to an object) of the
            # whole batch. Matching compares boxes alone, so they can be counted beforehand.
            n_positives = all_reduce_sum(criterion.count_positives(boxes, labels))

        optimizer.zero_grad()
        losses = torch.zeros(2, device=device)  # classification, localization
        micro_batches = zip(*(tensor.chunk(n_micro_batches) for tensor in (images, boxes, labels)))
        for number, (images, boxes, labels) in enumerate(micro_batches, 1):
            with synchronize_gradients(network, number == n_micro_batches), autocast:
                predicted_locs, predicted_scores = network(run.model.normalize(images))
            loss = criterion(predicted_locs, predicted_scores, boxes, labels, n_positives)
            loss = nan_if_not_finite(loss) * get_world_size()   # DDP averages, the sum is wanted
            scaler.scale(loss).backward()
            losses += torch.stack([criterion.conf_loss, criterion.loc_loss])
        is_finite = step_if_finite(optimizer, scaler)
        run.log.update(losses, is_finite, n_images)

        # One process stops at once; several ranks agree to stop, at the next row.
        if schedule.is_row_due(iteration) or stop_signal.is_set() and get_world_size() == 1:
            run.log.write_row(iteration, lr, scaler.get_scale())
            stop = is_set_in_any_rank(stop_signal, device)
            if stop or schedule.is_save_due(iteration):
                run.save(iteration)
            if schedule.is_evaluation_due(iteration) and (not stop or iteration == schedule.end):
                run.evaluate(iteration)
            if stop:
                break
            run.log.restart_clock()
    return iteration


# --------------------------------------------------------------------------------------------------
# Schedule and optimizer
# --------------------------------------------------------------------------------------------------


def get_lr(iteration, lr, warmup, decay_lr_at):
    """Return the learning rate of an iteration, counted from 0: a linear rise, then drops by 10."""
    if iteration < warmup:
        return lr * (iteration + 1) / warmup
    return lr * 0.1 ** sum(iteration >= drop for drop in decay_lr_at)


@dataclasses.dataclass
class Schedule:
    """The iterations of a run, their learning rates, and what is due after which of them.

    `start` and `end` are numbers of iterations done; the others are as in Parameters, but
    `eval_every` is 0 if there are no test images. The methods take the number of iterations done.
    """

    start: int
    end: int
    lr: float
    warmup: int
    decay_lr_at: tuple[int, ...]
    print_freq: int
    save_every: int
    eval_every: int

    def is_evaluation_due(self, iteration):
        """Return whether to evaluate."""
        return self.eval_every > 0 and (iteration == self.end or iteration % self.eval_every == 0)

    def is_save_due(self, iteration):
        """Return whether to save a checkpoint: before every evaluation, too."""
        return (iteration == self.end or iteration % self.save_every == 0
                or self.is_evaluation_due(iteration))

    def is_row_due(self, iteration):
        """Return whether to write a row of the log: before every checkpoint, too."""
        return (iteration % self.print_freq == 0 or iteration - self.start == ESTIMATE_AFTER
                or self.is_save_due(iteration))


def make_optimizer(model, kind, weight_decay):
    """Make SGD or AdamW with two groups: biases at twice the rate and without weight decay.

    The parameters of batch normalization, if there are any, are a third group, without either. The
    rate itself is set before each step, see `set_lr()`.
    """
    norms = [p for name, p in model.named_parameters() if is_norm(name)]
    named = [(name, p) for name, p in model.named_parameters() if not is_norm(name)]
    biases = [p for name, p in named if name.endswith('.bias')]
    others = [p for name, p in named if not name.endswith('.bias')]
    groups = [{'params': others, 'rate_factor': 1., 'weight_decay': weight_decay},
              {'params': biases, 'rate_factor': 2., 'weight_decay': 0.}]
    if norms:
        groups.append({'params': norms, 'rate_factor': 1., 'weight_decay': 0.})
    if kind == 'adamw':
        # Squared gradients are averaged over some 100 steps (by default 1,000): the large ones
        # of the start would slow down a short run.
        return torch.optim.AdamW(groups, betas=(0.9, 0.99), fused=True)
    optimizer = torch.optim.SGD(groups, lr=1e-3, momentum=0.9, fused=True)
    # If the first step is skipped, because its gradients are not finite, a fused SGD leaves its
    # momentum uninitialized. Momentum of 0 becomes the gradient in the first step, as it should.
    for parameter in model.parameters():
        optimizer.state[parameter]['momentum_buffer'] = torch.zeros_like(parameter)
    return optimizer


def set_lr(optimizer, lr):
    """Set the learning rate of the next step, in each group times its `rate_factor`."""
    for group in optimizer.param_groups:
        group['lr'] = lr * group['rate_factor']


# --------------------------------------------------------------------------------------------------
# Checkpoints and evaluations
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Run:
    """What a checkpoint holds of a run, where it is written, and what evaluations need."""

    model: SSD300
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    settings: dict  # the parameters, for a resumed run to compare with its own
    checkpoint: str
    test_loader: torch.utils.data.DataLoader
    autocast: torch.autocast    # evaluations compute in the precision of the training
    log: TrainingLog

    def save(self, iteration, path=None):
        """Write a checkpoint in rank 0, to `path` or `checkpoint`."""
        if get_rank() == 0:
            self.write_checkpoint(iteration, path or self.checkpoint)

    def write_checkpoint(self, iteration, path):
        """Write a checkpoint with all that a resumed run needs.

        It is the same in all ranks, but for the running statistics of batch normalization.

        Raises:
            UserError: weights or running statistics are not finite.
        """
        state = self.model.state_dict()
        if not all(tensor.isfinite().all() for tensor in state.values()):
            raise UserError(f'weights or statistics are not finite after {iteration} iterations; '
                            f'{path} stays as it was: lower --lr')
        save_checkpoint(path, iteration=iteration, model=state,
                        optimizer=self.optimizer.state_dict(), scaler=self.scaler.state_dict(),
                        label_map=self.model.label_map, parameters=self.settings)

    def evaluate(self, iteration):
        """Log the mAP on the test list, and keep the best checkpoint."""
        self.log.bar.clear()
        broadcast_buffers(self.model)   # each rank has its own running statistics
        _, mAP = evaluate(self.test_loader, self.model, coco=False, autocast=self.autocast)
        self.log.print(f'{iteration} iterations: mAP {mAP:.4f}')
        if mAP > self.log.best_mAP():
            self.save(iteration, sibling_path(self.checkpoint, '.best'))
        self.log.add_images(self.model, self.test_loader.dataset, iteration)
        self.log.add_mAP(mAP)


def enumerate_or_save(train_loader, start, run):
    """Enumerate batches from `start` + 1; if fetching one fails, save the iterations done before.

    Fetching fails if, for example, a worker was killed because memory ran out. The rank that it
    happens to writes the checkpoint, since the others may wait forever for this rank.
    """
    iteration = start
    try:
        for iteration, batch in enumerate(train_loader, start + 1):
            yield iteration, batch
    except Exception:
        if iteration > start:
            run.write_checkpoint(iteration, run.checkpoint)
            run.log.bar.clear()
            print(f'stopped after {iteration} iterations, written to {run.checkpoint}')
        raise


def load_start(p, model, optimizer, scaler, settings):
    """Load the checkpoint or the pretrained weights that the parameters name.

    Returns:
        The number of iterations that the checkpoint has behind it; 0 without one.
    """
    path = find_newest_checkpoint(p.checkpoint) if p.resume == 'auto' else p.resume
    if len(set(all_gather(path))) > 1:
        raise UserError('the machines of this run find different checkpoints; put --checkpoint '
                        'into a folder that all of them share')
    if path is None:
        if get_rank() == 0:
            if p.pretrained:    # DistributedDataParallel copies the weights of rank 0
                load_pretrained(model, p.init, p.weights)
            set_aside(p.checkpoint)
        barrier()   # a download may take longer than a collective operation waits
        broadcast_buffers(model)    # before the loss takes the priors
        return 0
    # With batch normalization, the images of one forward pass share their statistics.
    of_batch_norm = ('grad_accumulation', 'world_size') if p.batch_norm else ()
    start = restore(path, model, optimizer, scaler, settings, MUST_MATCH + of_batch_norm)
    # A finished run that is resumed again, as by a job queue, has nothing left to do.
    if start > p.iterations or start == p.iterations and p.resume != 'auto':
        raise UserError(f'{path} has {start} iterations already; give more --iterations')
    return start


def load_pretrained(model, init, weights):
    """Load the weights that `Parameters.init` describes, those of a file from `weights`."""
    if init == 'imagenet':
        model.base.load_pretrained_layers()
    elif init == 'caffe':
        start_from_caffe_vgg(model, weights)
    else:
        source = (SSD300.from_checkpoint(weights) if init == 'checkpoint' else
                  SSD300.from_state(download_coco('start from ImageNet with --init imagenet')))
        found = start_from(model, source)
        print(f'{len(found)} of {model.n_classes - 1} classes start with the scores of '
              f'{weights or "COCO"}: {", ".join(found) or "none"}')


# --------------------------------------------------------------------------------------------------
# Preparation
# --------------------------------------------------------------------------------------------------


def check_parameters(p):
    """Raise a UserError for invalid parameters; make the checkpoint's folder and clean it up."""
    check_at_least(1, iterations=p.iterations, batch_size=p.batch_size, save_every=p.save_every,
                   print_freq=p.print_freq, grad_accumulation=p.grad_accumulation)
    check_at_least(0, workers=p.workers, warmup=p.warmup, eval_every=p.eval_every, lr=p.lr,
                   weight_decay=p.weight_decay, seed=p.seed,
                   decay_lr_at=min(p.decay_lr_at, default=0))
    if p.init != 'imagenet' and not p.pretrained:
        raise UserError(f'--init {p.init} has no effect with --no-pretrained; leave one of the two '
                        f'out')
    if (p.weights is not None) != (p.init in ('caffe', 'checkpoint')):
        raise UserError(f'init is {p.init}, weights is {p.weights}; give a file as --weights with '
                        f'--init caffe or --init checkpoint, and only with these')
    if p.network == 'ssd512' and p.pretrained and p.init == 'coco':
        raise UserError('--init coco is an SSD300; leave --network ssd512 out, or give --init '
                        'imagenet')
    divisor = get_world_size() * p.grad_accumulation
    if p.batch_size % divisor:
        raise UserError(f'batch_size is {p.batch_size}, which {get_world_size()} processes times '
                        f'{p.grad_accumulation} micro-batches do not divide; give a --batch-size '
                        f'that {divisor} divides')
    if p.batch_norm and p.batch_size == divisor:    # conv11_2 has one cell per image
        raise UserError('batch normalization needs two images per micro-batch and process, more '
                        'are better; give a larger --batch-size')
    if p.priors != 'voc' and p.pretrained and p.init in ('coco', 'checkpoint'):
        raise UserError(f'the weights of --init {p.init} bring their own priors; leave --priors '
                        f'out')
    if p.batch_norm and p.pretrained and p.init != 'imagenet':
        raise UserError(f'the weights of --init {p.init} have no batch normalization, or have it '
                        f'folded into the convolutions; leave --batch-norm out, or give --init '
                        f'imagenet')
    n_images = p.batch_size // get_world_size() + TEST_BATCH_SIZE   # in a batch of either loader
    check_shared_memory(p.workers, n_images * 3 * NETWORKS[p.network].input_size ** 2)
    make_folder(pathlib.Path(p.checkpoint).resolve().parent)     # that of a link's target
    if pathlib.Path(p.checkpoint).is_dir():
        raise UserError(f'checkpoint {p.checkpoint} is a folder; give a file in it')
    checkpoints = p.checkpoint, sibling_path(p.checkpoint, '.best')
    if (p.resume not in (None, 'auto') and os.path.exists(p.checkpoint)
            and os.path.realpath(p.resume) not in map(os.path.realpath, checkpoints)):
        raise UserError(f'--resume {p.resume} would replace another checkpoint, {p.checkpoint}; '
                        f'give the --checkpoint of that run, or a new one')
    for path in checkpoints:
        remove_stale_temporaries(path)


def load_data_sets(data_folder, augment, batch_size, cache):
    """Load the training set and the test set of a data folder."""
    train_set = PascalVOCDataset(data_folder, 'TRAIN', keep_difficult=True, augment=augment)
    if batch_size > len(train_set):
        raise UserError(f'batch_size is {batch_size}, but there are only {len(train_set)} '
                        f'training images; give a smaller --batch-size, or lists with more images')
    if cache:
        train_set.cache = ImageCache(train_set.images)
    return train_set, PascalVOCDataset(data_folder, 'TEST', keep_difficult=True)


def print_summary(p, device, dtype, start, train_set, test_set):
    """Print what a run will do."""
    ranks = f' x {get_world_size()} processes' if get_world_size() > 1 else ''
    print(f'{device}{ranks}, {str(dtype).removeprefix("torch.")}; {len(train_set)} images to '
          f'train on, {len(test_set)} to test on, {len(train_set.label_map) - 1} classes, '
          f'{p.workers} workers')
    print(f'iterations {start} to {p.iterations} of {p.batch_size} images '
          f'({p.iterations * p.batch_size / len(train_set):.1f} epochs), {p.optimizer}, lr '
          f'{p.lr:g}, warm-up {p.warmup}, drops at {", ".join(map(str, p.decay_lr_at)) or "none"}')
    default = Parameters()
    if p.optimizer == 'sgd' and p.batch_size != default.batch_size and (
            p.lr == default.lr or p.decay_lr_at == default.decay_lr_at):
        factor = default.batch_size / p.batch_size
        drops = ' '.join(str(round(drop * factor)) for drop in default.decay_lr_at)
        print(f'note: lr {default.lr:g} is for batches of {default.batch_size}; with '
              f'{p.batch_size} the same is --lr {default.lr / factor:g} and {factor:g} times the '
              f'warm-up, iterations and drops, for VOC --warmup {round(default.warmup * factor)} '
              f'--iterations {round(default.iterations * factor)} --decay-lr-at {drops}')
    if p.warmup > p.iterations:
        print(f'warning: the warm-up of {p.warmup} iterations is longer than the run; give a '
              f'shorter --warmup')
    for drop in p.decay_lr_at:
        if drop < p.warmup:
            print(f'warning: the drop of the rate at {drop} is within the warm-up of {p.warmup} '
                  f'iterations, and comes after it; give --decay-lr-at or a shorter --warmup')
        if drop >= p.iterations:
            print(f'warning: the drop of the rate at {drop} never comes, the run ends at '
                  f'{p.iterations}; give --decay-lr-at')


if __name__ == '__main__':
    main(tyro.cli(Parameters))
