"""Tests of create_data_lists.py: the lists it writes, and its command line."""

import errno
import hashlib
import json
import os
import shutil
import sys

import pytest
from PIL import Image
from torchvision.datasets import utils as torchvision_utils, voc

from create_data_lists import (
    Parameters,
    create_data_lists,
    find_images,
    main,
    write_data_lists,
)
from support.errors import UserError
from utils import label_map as voc_label_map

LABEL_MAP = {'background': 0, 'cat': 1, 'dog': 2}
LISTS = ('TRAIN_images', 'TRAIN_objects', 'TEST_images', 'TEST_objects', 'label_map')
CAT = ('cat', (1, 1, 10, 10))
EMPTY = {'boxes': [], 'labels': [], 'difficulties': []}


def read_lists(folder):
    """Read the five files; no other file may be in the folder."""
    assert sorted(os.listdir(folder)) == sorted(f'{name}.json' for name in LISTS)
    return {name: json.loads((folder / f'{name}.json').read_text()) for name in LISTS}


def count_of(counts, word):
    """Return the one count whose name contains a word, 0 if there is none."""
    found = [count for what, count in counts.items() if word in what]
    assert len(found) <= 1, counts
    return sum(found)


def file_names(paths):
    return [os.path.basename(path) for path in paths]


# --------------------------------------------------------------------------------------------------
# Writing the lists
# --------------------------------------------------------------------------------------------------


def test_lists_of_a_small_folder(make_voc, tmp_path, monkeypatch, capsys):
    make_voc({'train': {'a': [('dog', (1, 1, 64, 48), 1), ('cat', (5.5, 5, 9, 9))], 'b': [CAT]},
              'test': {'c': [CAT]}})
    monkeypatch.chdir(tmp_path)  # relative paths are made absolute
    summary = write_data_lists([('voc', 'train')], [('voc', 'test')], 'made/here')
    lists = read_lists(tmp_path / 'made' / 'here')
    images = tmp_path / 'voc' / 'JPEGImages'
    assert lists['label_map'] == LABEL_MAP
    assert lists['TRAIN_images'] == [str(images / 'a.jpg'), str(images / 'b.jpg')]
    assert lists['TEST_images'] == [str(images / 'c.jpg')]
    assert lists['TRAIN_objects'] == [
        {'boxes': [[0, 0, 64, 48], [4.5, 4, 9, 9]], 'labels': [2, 1],
         'difficulties': [True, False]},
        {'boxes': [[0, 0, 10, 10]], 'labels': [1], 'difficulties': [False]}]
    assert summary['classes'] == ['cat', 'dog']
    assert summary['TRAIN']['images'] == 2 and summary['TRAIN']['objects'] == 3
    assert summary['TEST']['images'] == 1 and summary['TEST']['objects'] == 1
    assert count_of(summary['TRAIN'], 'difficult') == 1
    printed = capsys.readouterr().out
    assert '2 images, 3 objects' in printed and 'cat, dog' in printed


def test_boxes_past_the_border_and_images_without_objects(make_voc, tmp_path, capsys):
    faulty = {'past': [('cat', (-3, 0, 70, 20)), CAT],
              'outside': [('cat', (65, 1, 80, 20))],           # has no area once clipped
              'reversed': [('cat', (20, 5, 5, 20)), ('cat', (9, 5, 30, 4)), CAT],
              'nothing': []}
    root = make_voc({'all': faulty})
    summary = write_data_lists([(root, 'all')], [(root, 'all')], tmp_path / 'out', LABEL_MAP)
    lists = read_lists(tmp_path / 'out')
    boxes = dict(zip(file_names(lists['TEST_images']),
                     [objects['boxes'] for objects in lists['TEST_objects']]))
    assert boxes == {'past.jpg': [[0, 0, 64, 20], [0, 0, 10, 10]], 'outside.jpg': [],
                     'reversed.jpg': [[0, 0, 10, 10]], 'nothing.jpg': []}
    assert lists['TEST_objects'][3] == EMPTY
    # Images without objects are left out of TRAIN.
    assert file_names(lists['TRAIN_images']) == ['past.jpg', 'reversed.jpg']
    assert [len(objects['labels']) for objects in lists['TRAIN_objects']] == [2, 1]
    for split, n_images, word in (('TRAIN', 2, 'left out'), ('TEST', 4, 'kept')):
        counts = summary[split]
        assert (counts['images'], counts['objects']) == (n_images, 3)
        assert [count_of(counts, what) for what in ('clipped', 'dropped', word)] == [1, 3, 2]
    assert capsys.readouterr().out.count('clipped') == 2


def test_box_of_a_single_pixel_is_kept(make_voc, tmp_path):
    root = make_voc({'all': {'a': [('cat', (64, 48, 64, 48))]}})
    write_data_lists([(root, 'all')], [], tmp_path / 'out', LABEL_MAP)
    assert read_lists(tmp_path / 'out')['TRAIN_objects'][0]['boxes'] == [[63, 47, 64, 48]]


def test_image_files_are_found_by_name(make_voc, tmp_path):
    root = make_voc({'all': {stem: [CAT] for stem in ('a', 'b', 'c.1', 'd d', 'e 1', 'f f')}})
    images = root / 'JPEGImages'
    (images / 'a.jpg').rename(images / 'a.JPG')
    (images / 'b.jpg').unlink()
    Image.new('RGB', (64, 48)).save(images / 'b.png')
    (images / 'notes.txt').write_text('not an image')
    # A split of a single class, with flags and an empty line, and with Notepad's byte order mark.
    (root / 'ImageSets' / 'Main' / 'cat_all.txt').write_text(
        'a  1\n\nb -1\nc.1  0\nd d\ne 1\nf f 1\n', encoding='utf-8-sig')
    write_data_lists([(root, 'cat_all')], [], tmp_path / 'out', LABEL_MAP)
    found = file_names(read_lists(tmp_path / 'out')['TRAIN_images'])
    assert found == ['a.JPG', 'b.png', 'c.1.jpg', 'd d.jpg', 'e 1.jpg', 'f f.jpg']


def test_images_of_all_formats_are_found(tmp_path):
    names = ['a.jpg', 'b.jpeg', 'c.png', 'd.bmp', 'e.webp', 'f.tif', 'g.tiff', 'h.gif', 'i.TIFF']
    for name in (*names, 'j.txt', 'jpg'):
        (tmp_path / name).touch()
    assert sorted(path.name for path in find_images(tmp_path).values()) == names


def test_images_may_be_in_subfolders(make_voc, tmp_path):
    for part in ('JPEGImages/s', 'Annotations/s', 'JPEGImages/.thumbnails'):
        (tmp_path / 'voc' / part).mkdir(parents=True)
    root = make_voc({'all': {'q': [CAT], 's/q': [('dog', (1, 1, 9, 9))]}})
    images = root / 'JPEGImages'
    (images / 'link').symlink_to(images)
    shutil.copy(images / 'q.jpg', images / '.thumbnails')
    write_data_lists([(root, 'all')], [], tmp_path / 'out', LABEL_MAP)
    lists = read_lists(tmp_path / 'out')
    assert lists['TRAIN_images'] == [str(images / 'q.jpg'), str(images / 's' / 'q.jpg')]
    assert [objects['labels'] for objects in lists['TRAIN_objects']] == [[1], [2]]
    assert find_images(images).keys() == {'q', 's/q'}   # neither thumbnails nor links to folders


def test_label_map_is_given_or_found_in_the_annotations(make_voc, tmp_path):
    train = make_voc({'s': {'a': [('zebra', (1, 1, 9, 9)), ('ape', (1, 1, 9, 9))]}}, 'one')
    test = make_voc({'s': {'a': [('newt', (1, 1, 9, 9))]}}, 'two')
    given = {'background': 0, 'zebra': 1, 'newt': 2, 'yak': 3, 'ape': 4}
    for label_map, labels in ((None, [3, 1]), (given, [1, 4])):
        summary = write_data_lists([(train, 's')], [(test, 's')], tmp_path / 'out', label_map)
        lists = read_lists(tmp_path / 'out')
        expected = label_map or {'background': 0, 'ape': 1, 'newt': 2, 'zebra': 3}
        assert lists['label_map'] == expected
        assert lists['TRAIN_objects'][0]['labels'] == labels
        assert lists['TEST_objects'][0]['labels'] == [2]
        assert ['background', *summary['classes']] == list(expected)


def test_several_splits_become_one_list_in_order(make_voc, tmp_path):
    roots = [make_voc({'s': {stem: [CAT]}}, stem) for stem in ('z', 'a')]
    write_data_lists([(root, 's') for root in roots], [], tmp_path / 'out')
    lists = read_lists(tmp_path / 'out')
    assert file_names(lists['TRAIN_images']) == ['z.jpg', 'a.jpg']
    assert lists['TEST_images'] == lists['TEST_objects'] == []


def test_test_list_may_be_empty(make_voc, tmp_path, capsys):
    root = make_voc({'s': {'a': [CAT]}, 'empty': {}})
    for test_splits in ([], [(root, 'empty')]):
        summary = write_data_lists([(root, 's')], test_splits, tmp_path / 'out')
        assert summary['TEST'] == {'images': 0, 'objects': 0}
        assert 'TEST: 0 images, 0 objects\n' in capsys.readouterr().out
        lists = read_lists(tmp_path / 'out')
        assert lists['TEST_images'] == lists['TEST_objects'] == []


def test_images_in_both_lists_are_counted(make_voc, tmp_path, capsys):
    root = make_voc({'s': {'a': [CAT], 'b': [CAT]}, 't': {'b': [CAT], 'c': [CAT]}})
    summary = write_data_lists([(root, 's')], [(root, 't')], tmp_path / 'out')
    assert summary['TEST']['images that are in TRAIN, too'] == 1
    assert 'images that are in TRAIN, too: 1\n' in capsys.readouterr().out


def test_image_of_overlapping_splits_is_listed_once(make_voc, tmp_path):
    root = make_voc({'s': {'a': [CAT], 'b': [CAT]}, 't': {'b': [CAT], 'c': [CAT]}})
    summary = write_data_lists([(root, 's'), (root, 't'), (root, 's')], [], tmp_path / 'out')
    assert file_names(read_lists(tmp_path / 'out')['TRAIN_images']) == ['a.jpg', 'b.jpg', 'c.jpg']
    assert summary['TRAIN']['objects'] == 3


# --------------------------------------------------------------------------------------------------
# Checks
# --------------------------------------------------------------------------------------------------


def replace_size(root, stem, size):
    path = root / 'Annotations' / f'{stem}.xml'
    head, rest = path.read_text().split('<size>')
    path.write_text(head + size + rest.split('</size>')[1])


@pytest.mark.parametrize('size', [
    '', '<size></size>', '<size><width/><height> </height></size>',
    '<size><width>0</width><height>0</height></size>',
    '<size><height>48</height></size>', '<size><width>64.0</width><height>0</height></size>'])
def test_annotated_size_may_be_missing_or_0(size, make_voc, tmp_path):
    root = make_voc({'s': {'a': [CAT]}})
    replace_size(root, 'a', size)
    summary = write_data_lists([(root, 's')], [], tmp_path / 'out', LABEL_MAP)
    assert summary['TRAIN']['images'] == 1


def test_boxes_are_in_stored_pixels_whatever_the_exif_orientation(make_voc, tmp_path):
    root = make_voc({'s': {'a': [('cat', (60, 1, 64, 48))]}})
    image = Image.new('RGB', (64, 48))
    exif = image.getexif()
    exif[0x0112] = 6  # orientation: to be rotated by 90 degrees
    image.save(root / 'JPEGImages' / 'a.jpg', exif=exif)
    summary = write_data_lists([(root, 's')], [], tmp_path / 'out', LABEL_MAP)
    assert read_lists(tmp_path / 'out')['TRAIN_objects'][0]['boxes'] == [[59, 0, 64, 48]]
    assert count_of(summary['TRAIN'], 'EXIF') == 1


def test_class_that_only_the_test_images_have_is_named(make_voc, tmp_path, capsys):
    root = make_voc({'train': {'a': [CAT]}, 'test': {'b': [('Cat', (1, 1, 9, 9))]}})
    summary = write_data_lists([(root, 'train')], [(root, 'test')], tmp_path / 'out')
    assert summary['classes without objects to train on'] == ['Cat']
    assert '1 classes without objects to train on: Cat\n' in capsys.readouterr().out
    summary = write_data_lists([], [(root, 'test')], tmp_path / 'out')
    assert summary.keys() == {'classes', 'TRAIN', 'TEST'}


@pytest.mark.parametrize('maximum, n_dark', [(4095, 1), (65535, 0)])
def test_dark_images_of_16_bits_are_counted(make_voc, tmp_path, maximum, n_dark):
    root = make_voc({'s': {'a': [CAT]}})
    (root / 'JPEGImages' / 'a.jpg').unlink()
    Image.new('I;16', (64, 48), maximum).save(root / 'JPEGImages' / 'a.tif')
    summary = write_data_lists([(root, 's')], [], tmp_path / 'out', LABEL_MAP)
    assert sum(count for what, count in summary['TRAIN'].items() if 'dark' in what) == n_dark


# Each function makes image b or its split invalid and returns a pattern of the expected message.


def break_width(root):
    replace_size(root, 'b', '<size><width>48</width><height>64</height></size>')
    return 'b.xml.*48.*b.jpg.*64.*EXIF orientation.*exif_transpose'


def break_height(root):
    replace_size(root, 'b', '<size><height>47</height></size>')
    return 'b.xml.*47.*b.jpg.*48.*another image'


def break_image(root):
    path = root / 'JPEGImages' / 'b.jpg'
    path.write_bytes(path.read_bytes()[:-200])
    return 'b.jpg.*decoded.*--skip-broken'


def break_class(root):
    path = root / 'Annotations' / 'b.xml'
    path.write_text(path.read_text().replace('cat', 'zebra'))
    return "b.xml.*'zebra'"


def break_name(root):
    path = root / 'Annotations' / 'b.xml'
    path.write_text(path.read_text().replace('cat', 'c\nat'))
    return r"b.xml, object 1: 'c\\nat' is not a class name"


def break_root(root):
    path = root / 'Annotations' / 'b.xml'
    path.write_text(path.read_text().replace('annotation>', 'annotations>'))
    return 'b.xml: the root element is <annotations>'


def name_with_suffix(root):
    (root / 'ImageSets' / 'Main' / 'test.txt').write_text('a\nJPEGImages/b.jpg\n')
    return "test.txt.*'JPEGImages/b.jpg'.*without folder and suffix"


def remove_annotation(root):
    (root / 'Annotations' / 'b.xml').unlink()
    return 'b.xml'


def remove_image(root):
    (root / 'JPEGImages' / 'b.jpg').unlink()
    return "test.txt.*'b'"


def leave_folder(root):
    Image.new('RGB', (64, 48)).save(root / 'b.jpg')
    (root / 'ImageSets' / 'Main' / 'test.txt').write_text('a\n../b\n')
    return "test.txt.*'../b'.*no image of that name"


def name_copy(root):
    (root / 'ImageSets' / 'Main' / 'test.txt').write_text('a\nb (1)\n')
    return r"test.txt.*'b \(1\)'.*no image of that name"


def remove_split(root):
    (root / 'ImageSets' / 'Main' / 'test.txt').unlink()
    return 'test.txt.*no such split.*there are: train'


def break_layout(root):
    (root / 'Annotations').rename(root / 'annotations_')
    return 'VOC layout.*Annotations'


@pytest.mark.parametrize('break_it', [break_width, break_height, break_image, break_class,
                                      break_name, break_root, name_with_suffix, remove_annotation,
                                      remove_image, leave_folder, name_copy, remove_split,
                                      break_layout])
@pytest.mark.parametrize('old_lists', [False, True])
def test_invalid_folder_is_reported_and_no_list_changes(break_it, old_lists, make_voc, tmp_path):
    root, out = make_voc({'train': {'a': [CAT]}, 'test': {'a': [CAT], 'b': [CAT]}}), tmp_path / 'o'
    splits = [(root, 'train')], [(root, 'test')]
    if old_lists:
        write_data_lists(*splits, out, LABEL_MAP)
    before = read_lists(out) if old_lists else None
    pattern = break_it(root)
    with pytest.raises(UserError, match=f'(?s){pattern}'):
        write_data_lists(*splits, out, LABEL_MAP)
    if old_lists:
        assert read_lists(out) == before
    else:
        assert not out.exists() or os.listdir(out) == []


def test_missing_test_split_is_reported_before_any_image_is_read(make_voc, tmp_path, capsys):
    root = make_voc({'train': {'a': [CAT]}})
    with pytest.raises(UserError, match='no such split'):
        write_data_lists([(root, 'train')], [(root, 'test')], tmp_path / 'out')
    assert 'TRAIN' not in capsys.readouterr().err, 'the progress bar'


def test_missing_folder_is_reported(tmp_path):
    with pytest.raises(UserError, match='nowhere.*VOC layout'):
        write_data_lists([(tmp_path / 'nowhere', 'train')], [], tmp_path / 'out')


def test_class_named_background_is_refused(make_voc, tmp_path):
    root = make_voc({'s': {'a': [('background', (1, 1, 9, 9))]}})
    with pytest.raises(UserError, match="class 'background' .*; rename it"):
        write_data_lists([(root, 's')], [], tmp_path / 'out')
    assert not (tmp_path / 'out' / 'label_map.json').exists()


@pytest.mark.parametrize('content', [b'', b'not an image', 'truncated'])
def test_skip_broken_leaves_broken_images_out(content, make_voc, tmp_path, capsys):
    root = make_voc({'s': {'a': [CAT], 'b': [CAT], 'c': [CAT]}})
    path = root / 'JPEGImages' / 'b.jpg'
    path.write_bytes(path.read_bytes()[:-200] if content == 'truncated' else content)
    splits = [(root, 's')], [(root, 's')]
    with pytest.raises(UserError, match='b.jpg'):
        write_data_lists(*splits, tmp_path / 'out')
    capsys.readouterr()
    summary = write_data_lists(*splits, tmp_path / 'out', skip_broken=True)
    lists = read_lists(tmp_path / 'out')
    for split in ('TRAIN', 'TEST'):
        assert file_names(lists[f'{split}_images']) == ['a.jpg', 'c.jpg']
        assert len(lists[f'{split}_objects']) == summary[split]['images'] == 2
        assert count_of(summary[split], 'broken') == 1
    assert 'broken' in capsys.readouterr().out


def test_image_is_broken_whatever_exception_it_causes(make_voc, tmp_path, monkeypatch):
    root = make_voc({'s': {'a': [CAT]}})
    monkeypatch.setattr('create_data_lists.decode', lambda image: image + 1)
    with pytest.raises(UserError, match='a.jpg: cannot be decoded .*--skip-broken'):
        write_data_lists([(root, 's')], [], tmp_path / 'out')
    summary = write_data_lists([(root, 's')], [], tmp_path / 'out', skip_broken=True)
    assert count_of(summary['TRAIN'], 'broken') == 1


@pytest.mark.skipif(sys.platform != 'linux', reason='other file systems refuse such names')
def test_image_name_may_be_no_utf8(make_voc, tmp_path):
    name = os.fsdecode(b'\xff')
    root = make_voc({'s': {'a': [CAT]}})
    for folder, suffix in (('JPEGImages', '.jpg'), ('Annotations', '.xml')):
        (root / folder / f'a{suffix}').rename(root / folder / f'{name}{suffix}')
    (root / 'ImageSets' / 'Main' / 's.txt').write_bytes(b'\xff\n')
    write_data_lists([(root, 's')], [], tmp_path / 'out', LABEL_MAP)
    path, = read_lists(tmp_path / 'out')['TRAIN_images']
    assert path == str(root / 'JPEGImages' / f'{name}.jpg') and os.path.exists(path)


def test_output_folder_is_checked_before_reading(tmp_path):
    (tmp_path / 'file').write_text('in the way')
    for output in (tmp_path / 'file', tmp_path / 'file' / 'lists'):
        with pytest.raises(UserError, match='file'):  # not tmp_path, which is not in VOC layout
            write_data_lists([(tmp_path, 's')], [], output)
    assert (tmp_path / 'file').read_text() == 'in the way'


def test_old_lists_stay_if_the_new_ones_cannot_be_written(make_voc, tmp_path, monkeypatch):
    root, out = make_voc({'s': {'a': [CAT]}, 't': {'b': [CAT]}}), tmp_path / 'out'
    write_data_lists([(root, 's')], [(root, 's')], out)
    before, write_text, written = read_lists(out), type(out).write_text, []

    def write_to_full_disk(path, *args, **kwargs):
        written.append(path)
        if len(written) == 4:
            raise OSError(errno.ENOSPC, 'No space left on device')
        return write_text(path, *args, **kwargs)

    monkeypatch.setattr(type(out), 'write_text', write_to_full_disk)
    with pytest.raises(UserError, match='No space left'):
        write_data_lists([(root, 't')], [(root, 't')], out)
    assert read_lists(out) == before


def test_lists_of_voc(make_voc, tmp_path):
    voc07 = make_voc({'trainval': {'07a': [('dog', (1, 1, 9, 9))]},
                      'test': {'07t': [('person', (1, 1, 9, 9), 1)], '07e': []},
                      'unused': {'07u': [('zebra', (1, 1, 9, 9))]}}, 'VOC2007')
    voc12 = make_voc({'trainval': {'12a': [('tvmonitor', (1, 1, 9, 9))]}}, 'VOC2012')
    create_data_lists(voc07, voc12, tmp_path / 'out')
    lists = read_lists(tmp_path / 'out')
    assert lists['label_map'] == voc_label_map
    assert lists['TRAIN_images'] == [str(voc07 / 'JPEGImages' / '07a.jpg'),
                                     str(voc12 / 'JPEGImages' / '12a.jpg')]
    assert [objects['labels'] for objects in lists['TRAIN_objects']] == [[12], [20]]
    assert file_names(lists['TEST_images']) == ['07t.jpg', '07e.jpg']
    assert lists['TEST_objects'] == [
        {'boxes': [[0, 0, 9, 9]], 'labels': [15], 'difficulties': [True]}, EMPTY]


def test_lists_of_real_images(sample_data, tmp_path):
    root = sample_data / 'bccd'
    summary = write_data_lists([(root, 'val')], [(root, 'test')], tmp_path)
    lists = read_lists(tmp_path)
    assert lists['label_map'] == {'background': 0, 'Platelets': 1, 'RBC': 2, 'WBC': 3}
    assert (summary['TRAIN']['images'], summary['TEST']['images']) == (87, 72)
    for split in ('TRAIN', 'TEST'):
        counted = sum(len(objects['labels']) for objects in lists[f'{split}_objects'])
        assert counted == summary[split]['objects'] > 700


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------


def run(capsys=None, **parameters):
    """Run main; with capsys expect a user error and return the line printed."""
    if capsys is None:
        main(Parameters(**parameters))
        return None
    with pytest.raises(SystemExit) as stop:
        main(Parameters(**parameters))
    assert stop.value.code == 1
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.fixture
def archives(make_voc, tmp_path, monkeypatch):
    """Replace torchvision's URLs and checksums of VOC by those of archives of one image each."""
    table = {}
    for key, year, split, name in (('2007', 2007, 'trainval', 'dog'),
                                   ('2007-test', 2007, 'test', 'cat'),
                                   ('2012', 2012, 'trainval', 'sofa')):
        make_voc({split: {f'{key}_a': [(name, (1, 1, 30, 30))]}}, name=f'{key}/VOCdevkit/VOC{year}')
        file = shutil.make_archive(tmp_path / f'VOC{key}', 'tar', tmp_path / key)
        md5 = hashlib.md5((tmp_path / f'VOC{key}.tar').read_bytes()).hexdigest()
        table[key] = {**voc.DATASET_YEAR_DICT[key], 'url': f'file://{file}', 'md5': md5}
    monkeypatch.setattr(voc, 'DATASET_YEAR_DICT', table)
    # Copies in place of the network; checksums and unpacking are torchvision's.
    monkeypatch.setattr(torchvision_utils, '_urlretrieve', lambda url, filename, **_: shutil.copy(
        url.removeprefix('file://'), filename))
    return table


def test_download_of_voc_has_the_twenty_classes(archives, tmp_path):
    for _ in range(2):  # the second time nothing is downloaded
        run(download=str(tmp_path / 'new'), output_folder=str(tmp_path / 'lists'))
    assert len(read_lists(tmp_path / 'lists')['TRAIN_images']) == 2
    assert len(read_lists(tmp_path / 'lists')['TEST_images']) == 1
    assert read_lists(tmp_path / 'lists')['label_map'] == voc_label_map
    labels = [objects['labels'] for objects in read_lists(tmp_path / 'lists')['TRAIN_objects']]
    assert labels == [[voc_label_map['dog']], [voc_label_map['sofa']]]


@pytest.mark.parametrize('entry', [{'md5': '0' * 32}, {'url': 'file:///nowhere/VOC.tar'}])
def test_failed_download_is_reported(archives, tmp_path, capsys, entry):
    archives['2012'].update(entry)
    line = run(capsys, download=str(tmp_path / 'new'), output_folder=str(tmp_path / 'lists'))
    assert 'VOC2012 trainval could not be downloaded' in line and '--voc12-path' in line
    assert list((tmp_path / 'lists').iterdir()) == []


def test_voc_folders_have_the_twenty_classes(make_voc, tmp_path, capsys):
    voc07 = make_voc({'trainval': {'a': [('dog', (1, 1, 9, 9))]}, 'test': {'b': []}}, name='07')
    voc12 = make_voc({'trainval': {'c': [('unicorn', (1, 1, 9, 9))]}}, name='12')
    paths = {'voc07_path': str(voc07), 'voc12_path': str(voc12),
             'output_folder': str(tmp_path / 'lists')}
    assert "class 'unicorn' is none of" in run(capsys, **paths)
    (voc12 / 'Annotations' / 'c.xml').write_text('<annotation/>')
    run(**paths)
    assert read_lists(tmp_path / 'lists')['label_map'] == voc_label_map


def test_other_data_take_any_number_of_splits_and_their_own_classes(make_voc, tmp_path, capsys):
    a = make_voc({'s': {'a': [('cat', (1, 1, 9, 9))]}, 't': {'b': [('ant', (1, 1, 9, 9))]}}, 'a')
    b = make_voc({'s': {'c': [('dog', (1, 1, 9, 9))]}}, 'b:colon')
    run(train=(f'{a}:s', f'{b}:s'), test=(f'{a}:t',), output_folder=str(tmp_path / 'lists'))
    assert len(read_lists(tmp_path / 'lists')['TRAIN_images']) == 2
    assert list(read_lists(tmp_path / 'lists')['label_map']) == ['background', 'ant', 'cat', 'dog']

    run(train=(f'{a}:s',), classes=('zebra', 'cat'), output_folder=str(tmp_path / 'given'))
    assert read_lists(tmp_path / 'given')['label_map'] == {'background': 0, 'zebra': 1, 'cat': 2}
    line = run(capsys, train=(f'{b}:s',), classes=('cat',), output_folder=str(tmp_path / 'no'))
    assert "class 'dog' is none of" in line and str(b) in line


def test_skip_broken_is_an_option(make_voc, tmp_path, capsys):
    root = make_voc({'s': {'a': [CAT], 'b': [CAT]}})
    break_image(root)
    parameters = {'train': (f'{root}:s',), 'output_folder': str(tmp_path / 'lists')}
    assert 'with --skip-broken' in run(capsys, **parameters)
    run(**parameters, skip_broken=True)
    assert file_names(read_lists(tmp_path / 'lists')['TRAIN_images']) == ['a.jpg']


@pytest.mark.parametrize('parameters, message', [
    ({'train': ('nosplit',)}, "'nosplit' is not folder:split"),
    ({'train': (':split',)}, "':split' is not folder:split"),
    ({'train': ('a:b',), 'download': 'x'}, '--voc12-path are for VOC; leave them out'),
    ({'test': ('a:b',), 'voc07_path': 'x'}, '--voc12-path are for VOC; leave them out'),
    ({'train': ('a:b',), 'voc12_path': 'x'}, '--voc12-path are for VOC; leave them out'),
    ({'train': ('a:b',), 'classes': ('cat', 'cat')}, 'each class once'),
    ({'train': ('a:b',), 'classes': ('background',)}, 'leave background out'),
])
def test_invalid_parameters_are_reported(parameters, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in run(capsys, **parameters)
    assert list(tmp_path.iterdir()) == []
