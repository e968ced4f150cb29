"""Read folders in VOC layout and write the lists that training and evaluation read.

    python create_data_lists.py --voc07-path VOCdevkit/VOC2007 --voc12-path VOCdevkit/VOC2012
    python create_data_lists.py --train cells:trainval --test cells:test

Without an argument it does what the first line does.
"""

import dataclasses

import tyro
from torchvision.datasets import VOCDetection

from utils import (
    UserError,
    exit_on_user_error,
    label_map as voc_label_map,
    make_folder,
    write_data_lists,
)


@dataclasses.dataclass
class Parameters:
    """Make the lists of a data set in VOC layout."""

    # --- PASCAL VOC: 07 + 12 trainval to train, 07 test to test ---

    # The folder VOC2007, with JPEGImages, Annotations and ImageSets in it.
    voc07_path: str = './VOCdevkit/VOC2007'
    # The folder VOC2012.
    voc12_path: str = './VOCdevkit/VOC2012'
    # A folder to download both into (2.8 GB), in place of the two paths above.
    download: str | None = None

    # --- any other data set, in place of VOC ---

    # What to train on: any number of folder:split.
    train: tuple[str, ...] = ()
    # What to evaluate on: any number of folder:split.
    test: tuple[str, ...] = ()
    # Class names in the order of their numbers. Empty: those in the annotations, sorted.
    classes: tuple[str, ...] = ()

    # --- output ---

    # Folder for the lists.
    output_folder: str = './data'
    # Leave images that cannot be decoded out, in place of stopping at the first.
    skip_broken: bool = False


def download_voc(folder):
    """Download VOC 2007 and 2012 with torchvision, checksums included.

    Returns:
        The folders VOC2007 and VOC2012.
    """
    folder = make_folder(folder)
    for year, split in (('2007', 'trainval'), ('2007', 'test'), ('2012', 'trainval')):
        try:
            VOCDetection(folder, year, split, download=True)
        except (OSError, RuntimeError) as error:
            raise UserError(f'VOC{year} {split} could not be downloaded into {folder} ({error}); '
                            f'try again, or unpack the archives of '
                            f'http://host.robots.ox.ac.uk/pascal/VOC/ by hand and give '
                            f'--voc07-path and --voc12-path') from error
    return folder / 'VOCdevkit' / 'VOC2007', folder / 'VOCdevkit' / 'VOC2012'


def parse_split(text):
    """'folder:split' to (folder, split); the folder may hold colons itself."""
    folder, colon, split = text.rpartition(':')
    if not (folder and colon and split):
        raise UserError(f'{text!r} is not folder:split, such as VOC2007:trainval')
    return folder, split


@exit_on_user_error
def main(parameters):
    """Write the lists as the parameters say."""
    p = parameters
    own_data = bool(p.train or p.test)
    if own_data and p.download:
        raise UserError('--download is for VOC; leave it out, or leave out --train and --test')
    if own_data:
        train, test = ([parse_split(text) for text in texts] for texts in (p.train, p.test))
    else:
        voc07, voc12 = download_voc(p.download) if p.download else (p.voc07_path, p.voc12_path)
        train, test = [(voc07, 'trainval'), (voc12, 'trainval')], [(voc07, 'test')]
    label_map = None if own_data else voc_label_map
    if p.classes:
        if len(set(p.classes)) < len(p.classes) or 'background' in p.classes:
            raise UserError(f'--classes {" ".join(p.classes)}: each class once, and background is '
                            f'none of them')
        label_map = {'background': 0, **{name: i for i, name in enumerate(p.classes, 1)}}
    write_data_lists(train, test, p.output_folder, label_map, p.skip_broken)


if __name__ == '__main__':
    main(tyro.cli(Parameters))
