"""Tests of what utils.py makes of annotations, section 5: parsing, cleaning, data lists."""

import errno
import json
import os

import pytest
import torch
from conftest import annotation
from PIL import Image

import utils
from utils import UserError

# --------------------------------------------------------------------------------------------------
# Annotations
# --------------------------------------------------------------------------------------------------

CATS = {'background': 0, 'cat': 1, 'dog': 2}


@pytest.fixture
def parse(tmp_path):
    """A function that parses the text of an annotation."""
    def parse_text(text, label_map=CATS):
        path = tmp_path / 'note.xml'
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return utils.parse_annotation(path, label_map)
    return parse_text


def test_pixels_of_an_annotation_become_edges(parse):
    objects = parse(annotation([('dog', (1, 1, 64, 48), 1), ('cat', (10, 20, 10, 20), 0)]))
    assert objects == {'boxes': [[0, 0, 64, 48], [9, 19, 10, 20]], 'labels': [2, 1],
                       'difficulties': [True, False]}


def test_an_annotation_may_hold_floats_and_no_difficult_and_no_objects(parse):
    objects = parse(annotation([('cat', (1.25, ' 2.5\n', 1e1, '47.75'))]))
    assert objects == {'boxes': [[0.25, 1.5, 10, 47.75]], 'labels': [1], 'difficulties': [False]}
    assert parse('<annotation/>') == {'boxes': [], 'labels': [], 'difficulties': []}


def test_boxes_of_parts_are_not_objects(parse):
    part = ('<part><name>head</name><bndbox><xmin>3</xmin><ymin>3</ymin><xmax>4</xmax>'
            '<ymax>4</ymax></bndbox></part>')
    text = annotation([('cat', (2, 2, 30, 30))])
    wanted = {'boxes': [[1, 1, 30, 30]], 'labels': [1], 'difficulties': [False]}
    for place in ('</object>', '<bndbox>'):  # behind the object's own box, and before it
        assert parse(text.replace(place, part + place)) == wanted


def test_nothing_is_clipped_when_parsing(parse):
    text = annotation([('cat', (-5, 0, 999, 20)), ('cat', (9, 9, 3, 3))])
    assert parse(text)['boxes'] == [[-6, -1, 999, 20], [8, 8, 3, 3]]


def test_without_a_label_map_labels_are_names(parse):
    assert parse(annotation([('zebra', (1, 1, 2, 2))]), None)['labels'] == ['zebra']


GOOD = annotation([('cat', (1, 2, 3, 4), 0)])


@pytest.mark.parametrize('text, says', [
    ('', 'malformed XML'),
    (GOOD[:-20], 'malformed XML'),
    (b'\xff\xfe\x00' + GOOD.encode(), 'malformed XML'),
    (b'<?xml version="1.0" encoding="gbk"?>' + GOOD.encode(), 'note.xml'),
    (b'<?xml version="1.0" encoding="no-such"?>' + GOOD.encode(), 'note.xml'),
    (GOOD.replace('<xmin>1</xmin>', ''), 'object 1.*xmin'),
    (GOOD.replace('<ymax>4</ymax>', '<ymax></ymax>'), 'object 1.*ymax'),
    (GOOD.replace('>3<', '>three<'), "object 1.*xmax.*'three'"),
    (GOOD.replace('>3<', '>nan<'), "object 1.*xmax.*'nan'"),
    (GOOD.replace('>3<', '>inf<'), "object 1.*xmax.*'inf'"),
    (GOOD.replace('<name>cat</name>', ''), 'object 1.*name'),
    (GOOD.replace('cat', 'zebra'), "object 1.*'zebra'.*'cat', 'dog'"),
    (GOOD.replace('cat', 'background'), "object 1.*'background'"),
])
def test_a_faulty_annotation_is_a_slip_that_names_file_and_fault(text, says, parse):
    with pytest.raises(UserError, match=says) as error:
        parse(text)
    assert 'note.xml' in str(error.value)


def test_a_missing_annotation_is_a_slip(tmp_path):
    with pytest.raises(UserError, match='none.xml'):
        utils.parse_annotation(tmp_path / 'none.xml', CATS)


@pytest.mark.parametrize('folder, n_files, n_objects, classes', [
    ('voc-sample/VOC2007', 395, 899, set(utils.voc_labels)),
    ('voc-sample/VOC2012', 1037, 2092, set(utils.voc_labels)),
    ('bccd', 364, 4888, {'RBC', 'WBC', 'Platelets'}),
])
def test_real_annotations_are_read_whole(folder, n_files, n_objects, classes, sample_data):
    files = sorted((sample_data / folder / 'Annotations').glob('*.xml'))
    parsed = [utils.parse_annotation(path, None) for path in files]
    boxes = torch.tensor([box for objects in parsed for box in objects['boxes']])
    assert (len(files), len(boxes)) == (n_files, n_objects)
    assert {name for objects in parsed for name in objects['labels']} == classes
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] - boxes[:, :2] >= 1).all()


# --------------------------------------------------------------------------------------------------
# Data lists
# --------------------------------------------------------------------------------------------------

LISTS = ('TRAIN_images', 'TRAIN_objects', 'TEST_images', 'TEST_objects', 'label_map')
CAT = ('cat', (1, 1, 10, 10))
EMPTY = {'boxes': [], 'labels': [], 'difficulties': []}


def read_lists(folder):
    """The content of the five files, and nothing else may be there."""
    assert sorted(os.listdir(folder)) == sorted(f'{name}.json' for name in LISTS)
    return {name: json.loads((folder / f'{name}.json').read_text()) for name in LISTS}


def count_of(counts, word):
    """The one count of a summary whose name holds a word; 0 if there is none."""
    found = [count for what, count in counts.items() if word in what]
    assert len(found) <= 1, counts
    return sum(found)


def test_lists_of_a_small_folder(make_voc, tmp_path, monkeypatch, capsys):
    make_voc({'train': {'a': [('dog', (1, 1, 64, 48), 1), ('cat', (5.5, 5, 9, 9))], 'b': [CAT]},
              'test': {'c': [CAT]}})
    monkeypatch.chdir(tmp_path)  # relative in, absolute out
    summary = utils.write_data_lists([('voc', 'train')], [('voc', 'test')], 'made/here')
    lists = read_lists(tmp_path / 'made' / 'here')
    images = tmp_path / 'voc' / 'JPEGImages'
    assert lists['label_map'] == CATS
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


def test_boxes_past_the_border_and_images_without_objects_and_the_count_of_both(
        make_voc, tmp_path, capsys):
    faulty = {'past': [('cat', (-3, 0, 70, 20)), CAT],
              'outside': [('cat', (65, 1, 80, 20))],           # without area once it is clipped
              'reversed': [('cat', (20, 5, 5, 20)), ('cat', (9, 5, 30, 4)), CAT],
              'nothing': []}
    root = make_voc({'all': faulty})
    summary = utils.write_data_lists([(root, 'all')], [(root, 'all')], tmp_path / 'out', CATS)
    lists = read_lists(tmp_path / 'out')
    boxes = {os.path.basename(path).removesuffix('.jpg'): objects['boxes']
             for path, objects in zip(lists['TEST_images'], lists['TEST_objects'])}
    assert boxes == {'past': [[0, 0, 64, 20], [0, 0, 10, 10]], 'outside': [],
                     'reversed': [[0, 0, 10, 10]], 'nothing': []}
    assert lists['TEST_objects'][3] == EMPTY
    assert [os.path.basename(path) for path in lists['TRAIN_images']] == ['past.jpg',
                                                                          'reversed.jpg']
    assert [len(objects['labels']) for objects in lists['TRAIN_objects']] == [2, 1]
    for split, n_images, word in (('TRAIN', 2, 'left out'), ('TEST', 4, 'kept')):
        counts = summary[split]
        assert (counts['images'], counts['objects']) == (n_images, 3)
        assert [count_of(counts, what) for what in ('clipped', 'dropped', word)] == [1, 3, 2]
    assert capsys.readouterr().out.count('clipped') == 2


def test_a_pixel_is_a_box_with_area(make_voc, tmp_path):
    root = make_voc({'all': {'a': [('cat', (64, 48, 64, 48))]}})
    utils.write_data_lists([(root, 'all')], [], tmp_path / 'out', CATS)
    assert read_lists(tmp_path / 'out')['TRAIN_objects'][0]['boxes'] == [[63, 47, 64, 48]]


def test_image_names_of_many_kinds_are_found(make_voc, tmp_path):
    root = make_voc({'all': {stem: [CAT] for stem in ('a', 'b', 'c.1', 'd d')}})
    images = root / 'JPEGImages'
    (images / 'a.jpg').rename(images / 'a.JPG')
    (images / 'b.jpg').unlink()
    Image.new('RGB', (64, 48)).save(images / 'b.png')
    (images / 'notes.txt').write_text('not an image')
    # As the lists of a single class are, and with an empty line.
    (root / 'ImageSets' / 'Main' / 'cat_all.txt').write_text('a  1\n\nb -1\nc.1  0\nd d\n')
    utils.write_data_lists([(root, 'cat_all')], [], tmp_path / 'out', CATS)
    found = [os.path.basename(path) for path in read_lists(tmp_path / 'out')['TRAIN_images']]
    assert found == ['a.JPG', 'b.png', 'c.1.jpg', 'd d.jpg']


def test_a_given_label_map_is_kept_and_classes_that_are_found_are_sorted(make_voc, tmp_path):
    train = make_voc({'s': {'a': [('zebra', (1, 1, 9, 9)), ('ape', (1, 1, 9, 9))]}}, 'one')
    test = make_voc({'s': {'a': [('newt', (1, 1, 9, 9))]}}, 'two')
    given = {'background': 0, 'zebra': 1, 'newt': 2, 'yak': 3, 'ape': 4}
    for label_map, labels in ((None, [3, 1]), (given, [1, 4])):
        summary = utils.write_data_lists([(train, 's')], [(test, 's')], tmp_path / 'out', label_map)
        lists = read_lists(tmp_path / 'out')
        wanted = label_map or {'background': 0, 'ape': 1, 'newt': 2, 'zebra': 3}
        assert lists['label_map'] == wanted
        assert lists['TRAIN_objects'][0]['labels'] == labels
        assert lists['TEST_objects'][0]['labels'] == [2]
        assert ['background', *summary['classes']] == list(wanted)


def test_several_folders_become_one_list_in_order(make_voc, tmp_path):
    roots = [make_voc({'s': {stem: [CAT]}}, stem) for stem in ('z', 'a')]
    utils.write_data_lists([(root, 's') for root in roots], [], tmp_path / 'out')
    lists = read_lists(tmp_path / 'out')
    assert [os.path.basename(path) for path in lists['TRAIN_images']] == ['z.jpg', 'a.jpg']
    assert lists['TEST_images'] == lists['TEST_objects'] == []


def edit_size(root, stem, size):
    """Write another size element into an annotation."""
    path = root / 'Annotations' / f'{stem}.xml'
    head, rest = path.read_text().split('<size>')
    path.write_text(head + size + rest.split('</size>')[1])


@pytest.mark.parametrize('size', [
    '', '<size></size>', '<size><width>0</width><height>0</height></size>',
    '<size><height>48</height></size>', '<size><width>64.0</width><height>0</height></size>'])
def test_a_size_may_be_missing_or_0(size, make_voc, tmp_path):
    root = make_voc({'s': {'a': [CAT]}})
    edit_size(root, 'a', size)
    summary = utils.write_data_lists([(root, 's')], [], tmp_path / 'out', CATS)
    assert summary['TRAIN']['images'] == 1


def test_the_size_of_a_turned_photo_is_the_stored_one(make_voc, tmp_path):
    root = make_voc({'s': {'a': [('cat', (60, 1, 64, 48))]}})
    image = Image.new('RGB', (64, 48))
    exif = image.getexif()
    exif[0x0112] = 6  # orientation: to be turned by 90 degrees
    image.save(root / 'JPEGImages' / 'a.jpg', exif=exif)
    utils.write_data_lists([(root, 's')], [], tmp_path / 'out', CATS)
    assert read_lists(tmp_path / 'out')['TRAIN_objects'][0]['boxes'] == [[59, 0, 64, 48]]


def break_size(root):
    edit_size(root, 'b', '<size><width>48</width><height>64</height></size>')
    return 'b.xml.*48.*b.jpg.*64'


def break_height(root):
    edit_size(root, 'b', '<size><height>47</height></size>')
    return 'b.xml.*47.*b.jpg.*48'


def break_image(root):
    path = root / 'JPEGImages' / 'b.jpg'
    path.write_bytes(path.read_bytes()[:-200])
    return 'b.jpg.*decoded.*--skip-broken'


def break_class(root):
    (root / 'Annotations' / 'b.xml').write_text(annotation([('zebra', (1, 1, 9, 9))]))
    return "b.xml.*'zebra'"


def break_annotation(root):
    (root / 'Annotations' / 'b.xml').unlink()
    return 'b.xml'


def break_name(root):
    (root / 'JPEGImages' / 'b.jpg').unlink()
    return "test.txt.*'b'"


def break_split(root):
    (root / 'ImageSets' / 'Main' / 'test.txt').unlink()
    return 'test.txt.*no such split.*there are: train'


def break_layout(root):
    (root / 'Annotations').rename(root / 'annotations_')
    return 'VOC layout.*Annotations'


@pytest.mark.parametrize('break_it', [break_size, break_height, break_image, break_class,
                                      break_annotation, break_name, break_split, break_layout])
@pytest.mark.parametrize('old_lists', [False, True])
def test_a_slip_in_the_folder_is_named_and_nothing_is_written(break_it, old_lists, make_voc,
                                                              tmp_path):
    root, out = make_voc({'train': {'a': [CAT]}, 'test': {'a': [CAT], 'b': [CAT]}}), tmp_path / 'o'
    splits = [(root, 'train')], [(root, 'test')]
    if old_lists:
        utils.write_data_lists(*splits, out, CATS)
    before = read_lists(out) if old_lists else None
    says = break_it(root)
    with pytest.raises(UserError, match=f'(?s){says}'):
        utils.write_data_lists(*splits, out, CATS)
    if old_lists:
        assert read_lists(out) == before
    else:
        assert not out.exists() or os.listdir(out) == []


def test_a_folder_that_is_not_there_is_a_slip(tmp_path):
    with pytest.raises(UserError, match='nowhere.*VOC layout'):
        utils.write_data_lists([(tmp_path / 'nowhere', 'train')], [], tmp_path / 'out')


def test_a_class_named_background_is_a_slip(make_voc, tmp_path):
    root = make_voc({'s': {'a': [('background', (1, 1, 9, 9))]}})
    with pytest.raises(UserError, match='background'):
        utils.write_data_lists([(root, 's')], [], tmp_path / 'out')
    assert not (tmp_path / 'out' / 'label_map.json').exists()


@pytest.mark.parametrize('content', [b'', b'not an image', 'truncated'])
def test_broken_images_can_be_left_out_and_are_counted(content, make_voc, tmp_path, capsys):
    root = make_voc({'s': {'a': [CAT], 'b': [CAT], 'c': [CAT]}})
    path = root / 'JPEGImages' / 'b.jpg'
    path.write_bytes(path.read_bytes()[:-200] if content == 'truncated' else content)
    splits = [(root, 's')], [(root, 's')]
    with pytest.raises(UserError, match='b.jpg'):
        utils.write_data_lists(*splits, tmp_path / 'out')
    capsys.readouterr()
    summary = utils.write_data_lists(*splits, tmp_path / 'out', skip_broken=True)
    lists = read_lists(tmp_path / 'out')
    for split in ('TRAIN', 'TEST'):
        assert [os.path.basename(path) for path in lists[f'{split}_images']] == ['a.jpg', 'c.jpg']
        assert len(lists[f'{split}_objects']) == summary[split]['images'] == 2
        assert count_of(summary[split], 'broken') == 1
    assert 'broken' in capsys.readouterr().out


def test_an_output_folder_that_cannot_be_written_is_a_slip_before_any_work(tmp_path):
    (tmp_path / 'file').write_text('in the way')
    for output in (tmp_path / 'file', tmp_path / 'file' / 'lists'):
        with pytest.raises(UserError, match='file'):  # and not the folder without VOC's layout
            utils.write_data_lists([(tmp_path, 's')], [], output)
    assert (tmp_path / 'file').read_text() == 'in the way'


def test_lists_that_cannot_be_written_leave_the_old_ones(make_voc, tmp_path, monkeypatch):
    root, out = make_voc({'s': {'a': [CAT]}, 't': {'b': [CAT]}}), tmp_path / 'out'
    utils.write_data_lists([(root, 's')], [(root, 's')], out)
    before, write_text, written = read_lists(out), type(out).write_text, []

    def full(path, *args, **kwargs):
        written.append(path)
        if len(written) == 4:
            raise OSError(errno.ENOSPC, 'No space left on device')
        return write_text(path, *args, **kwargs)
    monkeypatch.setattr(type(out), 'write_text', full)
    with pytest.raises(UserError, match='No space left'):
        utils.write_data_lists([(root, 't')], [(root, 't')], out)
    assert read_lists(out) == before


def test_vocs_own_lists(make_voc, tmp_path):
    voc07 = make_voc({'trainval': {'07a': [('dog', (1, 1, 9, 9))]},
                      'test': {'07t': [('person', (1, 1, 9, 9), 1)], '07e': []},
                      'unused': {'07u': [('zebra', (1, 1, 9, 9))]}}, 'VOC2007')
    voc12 = make_voc({'trainval': {'12a': [('tvmonitor', (1, 1, 9, 9))]}}, 'VOC2012')
    utils.create_data_lists(voc07, voc12, tmp_path / 'out')
    lists = read_lists(tmp_path / 'out')
    assert lists['label_map'] == utils.label_map
    assert lists['TRAIN_images'] == [str(voc07 / 'JPEGImages' / '07a.jpg'),
                                     str(voc12 / 'JPEGImages' / '12a.jpg')]
    assert [objects['labels'] for objects in lists['TRAIN_objects']] == [[12], [20]]
    assert [os.path.basename(path) for path in lists['TEST_images']] == ['07t.jpg', '07e.jpg']
    assert lists['TEST_objects'] == [
        {'boxes': [[0, 0, 9, 9]], 'labels': [15], 'difficulties': [True]}, EMPTY]


def test_lists_of_real_images(sample_data, tmp_path):
    root = sample_data / 'bccd'
    summary = utils.write_data_lists([(root, 'val')], [(root, 'test')], tmp_path)
    lists = read_lists(tmp_path)
    assert lists['label_map'] == {'background': 0, 'Platelets': 1, 'RBC': 2, 'WBC': 3}
    assert (summary['TRAIN']['images'], summary['TEST']['images']) == (87, 72)
    for split in ('TRAIN', 'TEST'):
        counted = sum(len(objects['labels']) for objects in lists[f'{split}_objects'])
        assert counted == summary[split]['objects'] > 700
