"""Tests of support/coco_lists.py: from files in COCO's format to lists and result files."""

import contextlib
import copy
import io
import json
import math
import random
import re

import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.models.detection import SSD300_VGG16_Weights

import eval as evaluation
from create_data_lists import (
    Parameters,
    main,
    number_classes,
    write_coco_lists,
    write_data_lists,
)
from datasets import PascalVOCDataset
from support.coco_lists import make_results, parse_exports, read_evaluation, read_results
from support.coco_metrics import SUMMARY, coco_summary
from support.errors import UserError
from support.published import coco_label_map
from utils import Detections

CATEGORIES = [{'id': 7, 'name': 'dog'}, {'id': 3, 'name': ' cat '}]     # not in order, with gaps


@pytest.fixture
def make_coco(tmp_path):
    """Return a function that writes images and NAME.json, and returns (file, folder)."""
    def make(images, annotations, categories=CATEGORIES, name='export', size=(64, 48)):
        folder = tmp_path / name
        for file_name in images.values():
            path = folder / file_name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new('RGB', size).save(path)
        content = {
            'info': {'year': 2017}, 'categories': copy.deepcopy(categories),
            'images': [{'id': i, 'file_name': file_name, 'width': size[0], 'height': size[1],
                        'license': 1} for i, file_name in images.items()],
            'annotations': [{'id': 100 + number, 'segmentation': [[1., 2., 3.5]], **annotation}
                            for number, annotation in enumerate(annotations)]}
        path = tmp_path / f'{name}.json'
        path.write_text(json.dumps(content))
        return path, folder
    return make


def annotate(image_id, category_id, bbox, iscrowd=0, **more):
    return {'image_id': image_id, 'category_id': category_id, 'bbox': bbox, 'iscrowd': iscrowd,
            **more}


def read_list(folder, name):
    return json.loads((folder / f'{name}.json').read_text())


@pytest.fixture
def export(make_coco):
    """Floats, a crowd, boxes without width, and images without objects, under ids with gaps."""
    return make_coco({9: 'a.jpg', 4: 'sub/b.png', 139: 'c.jpg', 11: 'd.jpg'}, [
        annotate(9, 7, [1.5, 2.25, 10, 20.5], area=77.5), annotate(4, 3, [60, 40, 10, 10], area=50),
        annotate(9, 3, [0, 0, 30, 30], 1, area=400, segmentation={'counts': [3], 'size': [64, 48]}),
        annotate(9, 3, [5, 5, 0, 20], area=0), annotate(9, 3, [5, 5, 20, 1], area=10),
        annotate(139, 7, [0, 0, 60, 40], 1, area=2000)])


# --------------------------------------------------------------------------------------------------
# Lists
# --------------------------------------------------------------------------------------------------


def test_lists_of_a_crafted_file(export, tmp_path, capsys):
    file, folder = export
    summary = write_coco_lists([export], [export], tmp_path / 'lists')
    lists = tmp_path / 'lists'
    assert read_list(lists, 'label_map') == {'background': 0, 'cat': 1, 'dog': 2}
    a, b, c, d = (str(folder / name) for name in ('a.jpg', 'sub/b.png', 'c.jpg', 'd.jpg'))
    assert read_list(lists, 'TRAIN_images') == [a, b]
    assert read_list(lists, 'TRAIN_objects') == [
        {'boxes': [[1.5, 2.25, 11.5, 22.75]], 'labels': [2], 'difficulties': [False]},
        {'boxes': [[60, 40, 64, 48]], 'labels': [1], 'difficulties': [False]}]
    assert read_list(lists, 'TEST_images') == [a, b, c, d]
    objects = read_list(lists, 'TEST_objects')
    assert objects[0] == {'boxes': [[1.5, 2.25, 11.5, 22.75], [0, 0, 30, 30]], 'labels': [2, 1],
                          'difficulties': [False, False], 'crowds': [False, True]}
    assert summary['TRAIN'] == {
        'images': 2, 'objects': 2, 'crowds, left out': 2, 'boxes of a pixel or less, dropped': 2,
        'boxes past the border, clipped': 1, 'images without objects, left out': 2}
    assert summary['TEST'] == {
        'images': 4, 'objects': 4, 'crowds': 2, 'boxes of a pixel or less, dropped': 2,
        'boxes past the border, clipped': 1, 'images without objects, kept': 1,
        'images that are in TRAIN, too': 2}
    # COCO's evaluation has the original boxes, ids and areas.
    coco = read_list(lists, 'TEST_coco')
    assert [image['id'] for image in coco['images']] == [9, 4, 139, 11]
    assert coco['categories'] == [{'id': 3, 'name': 'cat'}, {'id': 7, 'name': 'dog'}]
    assert {(row['image_id'], row['category_id'], *row['bbox'], row['area'], row['iscrowd'])
            for row in coco['annotations']} == {
        (9, 7, 1.5, 2.25, 10, 20.5, 77.5, 0), (4, 3, 60, 40, 10, 10, 50, 0),
        (9, 3, 0, 0, 30, 30, 400, 1), (9, 3, 5, 5, 0, 20, 0, 0), (9, 3, 5, 5, 20, 1, 10, 0),
        (139, 7, 0, 0, 60, 40, 2000, 1)}


def test_export_that_is_named_twice_is_read_once(export, tmp_path, monkeypatch):
    file, folder = export
    monkeypatch.chdir(tmp_path)
    write_coco_lists([export, (file.name, folder.name)], [], tmp_path / 'lists')
    assert len(read_list(tmp_path / 'lists', 'TRAIN_images')) == 2


def test_image_under_two_ids_is_a_user_error(make_coco, tmp_path):
    """The objects of one id would be background to the other."""
    rows = [annotate(1, 7, [0, 0, 9, 9]), annotate(2, 3, [20, 20, 9, 9])]
    one = make_coco({1: 'a.jpg', 2: 'b/../a.jpg'}, rows, name='one')
    one[0].write_text(one[0].read_text().replace('b/../', './'))
    two = make_coco({1: 'a.jpg', 2: 'b.jpg'}, rows, name='two')
    other = tmp_path / 'other.json'
    other.write_text(two[0].read_text())
    for exports, name in (([one], 'one/a.jpg'), ([two, (other, two[1])], 'two/a.jpg')):
        with pytest.raises(UserError, match=f'{name} is listed 2 times.*under one image id'):
            write_coco_lists(exports, [], tmp_path / 'lists')


def test_crowds_are_difficult_by_the_rules_of_voc_alone(export, tmp_path):
    write_coco_lists([], [export], tmp_path / 'lists')
    dataset = PascalVOCDataset(tmp_path / 'lists', 'TEST', keep_difficult=True)
    assert dataset[0][3].tolist() == [False, True]
    assert len(PascalVOCDataset(tmp_path / 'lists', 'TEST')[0][2]) == 1


def test_coco_has_80_classes_with_ids_to_90(make_coco, tmp_path):
    # torchvision lists COCO's 91 ids from 0, and 10 of them besides the background are unused.
    names = SSD300_VGG16_Weights.COCO_V1.meta['categories']
    categories = [{'id': i, 'name': name} for i, name in enumerate(names)
                  if name not in ('__background__', 'N/A')]
    export = make_coco({1: 'a.jpg'}, [annotate(1, 90, [0, 0, 20, 20])], categories)
    summary = write_coco_lists([export], [export], tmp_path / 'lists')
    assert len(names) == 91 and len(summary['classes']) == 80
    assert read_list(tmp_path / 'lists', 'TRAIN_objects')[0]['labels'] == [80]
    label_map = read_list(tmp_path / 'lists', 'label_map')
    assert (label_map['person'], label_map['stop sign'], label_map['toothbrush']) == (1, 12, 80)
    data = read_evaluation(tmp_path / 'lists', read_list(tmp_path / 'lists', 'TEST_images'),
                           label_map)
    # The published weights have 91 indices; what they detect as an unused one is dropped.
    model = torch.nn.Linear(1, 1)
    model.label_map = coco_label_map()
    dataset = PascalVOCDataset(tmp_path / 'lists', 'TEST')
    evaluation.check_dataset(evaluation.Parameters(), model, dataset)
    found = Detections([torch.rand(3, 4)], [torch.tensor([90, 12, 13])],
                       [torch.tensor([.9, .8, .7])])
    relabeled = evaluation.relabel(found, coco_label_map(), label_map)
    assert relabeled.labels[0].tolist() == [80, 12]
    assert torch.equal(relabeled.boxes[0], found.boxes[0][[0, 2]])
    assert [row['category_id'] for row in make_results(relabeled, data, label_map)] == [90, 13]


def test_classes_of_several_files_are_joined_by_name(make_coco, tmp_path):
    one = make_coco({1: 'a.jpg', 2: 'b.jpg'}, [annotate(2, 7, [0, 0, 9, 9])], name='one')
    two = make_coco({1: 'a.jpg'}, [annotate(1, 1, [0, 0, 9, 9]), annotate(1, 3, [0, 0, 8, 8])],
                    [{'id': 1, 'name': 'dog'}, {'id': 3, 'name': 'ant'}], name='two')
    write_coco_lists([one], [one, two], tmp_path / 'lists')
    label_map = read_list(tmp_path / 'lists', 'label_map')
    assert label_map == {'background': 0, 'cat': 1, 'dog': 2, 'ant': 3}
    assert [objects['labels'] for objects in read_list(tmp_path / 'lists', 'TEST_objects')] == [
        [], [2], [2, 3]]
    # Image 1 is in both files, and category 3 has two names: both are numbered anew.
    coco = read_list(tmp_path / 'lists', 'TEST_coco')
    assert [image['id'] for image in coco['images']] == [1, 2, 3]
    assert [(row['image_id'], row['category_id']) for row in coco['annotations']] == [
        (2, 2), (3, 2), (3, 3)]
    assert {row['name']: row['id'] for row in coco['categories']} == {'cat': 1, 'dog': 2, 'ant': 3}


@pytest.mark.parametrize('train_names, classes, ids', [
    ({1: 'ant', 2: 'cat'}, (), {'ant': 1, 'cat': 3, 'dog': 7}),     # 3 rather than TRAIN's 2
    ({3: 'ant'}, (), {'ant': 1, 'cat': 3, 'dog': 7}),               # 3 is taken
    ({}, ('dog', 'bee', 'cat', 'ant'), {'dog': 7, 'bee': 1, 'cat': 3, 'ant': 2})])
def test_test_list_keeps_its_category_ids_besides_other_classes(make_coco, tmp_path, train_names,
                                                                classes, ids):
    test = make_coco({1: 'a.jpg'}, [annotate(1, 7, [0, 0, 9, 9])], name='test')
    train = make_coco({1: 'a.jpg'}, [], [{'id': i, 'name': name} for i, name in
                                         train_names.items()], name='train')
    label_map = number_classes(classes) if classes else None
    write_coco_lists([train], [test], tmp_path / 'lists', label_map)
    coco = read_list(tmp_path / 'lists', 'TEST_coco')
    assert {row['name']: row['id'] for row in coco['categories']} == ids
    assert [row['category_id'] for row in coco['annotations']] == [7]


@pytest.mark.parametrize('group', [{'id': 0, 'name': 'cat'}, {'id': 9, 'name': 'cat'},
                                   {'id': 0, 'name': 'background'}])
def test_category_without_annotations_may_have_the_name_of_a_class(make_coco, tmp_path, group):
    export = make_coco({1: 'a.jpg'}, [annotate(1, 3, [0, 0, 9, 9])], [group, *CATEGORIES])
    write_coco_lists([export], [export], tmp_path / 'lists')
    lists = tmp_path / 'lists'
    assert read_list(lists, 'label_map') == {'background': 0, 'cat': 1, 'dog': 2}
    coco = read_list(lists, 'TEST_coco')
    assert coco['categories'] == [{'id': 3, 'name': 'cat'}, {'id': 7, 'name': 'dog'}]
    assert [row['category_id'] for row in coco['annotations']] == [3]


def test_given_classes_are_those_of_the_lists(export, tmp_path):
    write_coco_lists([export], [export], tmp_path / 'lists', {'background': 0, 'dog': 1, 'cat': 2})
    assert read_list(tmp_path / 'lists', 'TRAIN_objects')[0]['labels'] == [1]
    with pytest.raises(UserError, match="class 'cat' is not one of"):
        write_coco_lists([export], [], tmp_path / 'lists', {'background': 0, 'dog': 1})


def test_broken_image_is_left_out_of_the_evaluation_too(export, tmp_path):
    (export[1] / 'a.jpg').write_bytes(b'')
    with pytest.raises(UserError, match='a.jpg: cannot be decoded'):
        write_coco_lists([], [export], tmp_path / 'lists')
    summary = write_coco_lists([], [export], tmp_path / 'lists', skip_broken=True)
    assert summary['TEST']['broken images, left out'] == 1
    coco = read_list(tmp_path / 'lists', 'TEST_coco')
    assert [image['id'] for image in coco['images']] == [4, 139, 11]
    assert {row['image_id'] for row in coco['annotations']} == {4, 139}


def test_area_and_iscrowd_may_be_missing_and_annotations_too(export, make_coco, tmp_path):
    file, folder = export
    content = json.loads(file.read_text())
    for row in content['annotations']:
        del row['area'], row['iscrowd']
    for row in content['images']:
        del row['width'], row['height']
    file.write_text(json.dumps(content), encoding='utf-8-sig')
    summary = write_coco_lists([], [export], tmp_path / 'lists')
    assert summary['TEST']['objects'] == 4
    row = read_list(tmp_path / 'lists', 'TEST_coco')['annotations'][0]
    assert row['area'] == 10 * 20.5 and row['iscrowd'] == 0
    del content['annotations']      # as in COCO's image_info_test-dev2017.json
    file.write_text(json.dumps(content))
    summary = write_coco_lists([], [export], tmp_path / 'lists')
    assert summary['TEST'] == {'images': 4, 'objects': 0, 'images without objects, kept': 4}


def test_lists_in_voc_layout_replace_those_of_coco(export, make_voc, tmp_path):
    lists = tmp_path / 'lists'
    write_coco_lists([export], [export], lists)
    voc = make_voc({'s': {'a': [('cat', (1, 1, 9, 9))]}})
    write_data_lists([(voc, 's')], [(voc, 's')], lists)
    assert not (lists / 'TEST_coco.json').exists()
    assert read_evaluation(lists, read_list(lists, 'TEST_images'), {}) is None


# --------------------------------------------------------------------------------------------------
# Invalid files
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('keys, value, message', [
    (('images',), None, 'not an annotation file'),
    (('categories',), {}, 'not an annotation file'),
    (('annotations',), 3, 'not an annotation file'),
    (('images', 0), 5, 'image number 1: 5 has no id'),
    (('images', 0, 'id'), '9', 'image number 1: .* has no id'),
    (('images', 0, 'id'), True, 'image number 1: .* has no id'),
    (('images', 0, 'id'), 4, 'the image id 4 occurs twice'),
    (('categories', 0, 'id'), 3, 'the category id 3 occurs twice'),
    (('annotations', 0, 'id'), 101, 'the annotation id 101 occurs twice'),
    (('categories', 0, 'name'), None, 'category 7: None is not a class name'),
    (('categories', 0, 'name'), ' ', "category 7: ' ' is not a class name"),
    (('categories', 0, 'name'), 'background', "a category with annotations is named 'background'"),
    (('categories', 0, 'name'), 'cat', "2 categories are named 'cat'"),
    (('annotations', 0, 'image_id'), 5, 'annotation 100: image_id 5 is not in the file'),
    (('annotations', 0, 'image_id'), [], r'annotation 100: image_id \[\] is not in the file'),
    (('annotations', 0, 'category_id'), 5, 'annotation 100: category_id 5 is not in the file'),
    (('annotations', 0, 'bbox'), None, 'annotation 100: bbox is None, .*not only segmentations'),
    (('annotations', 0, 'bbox'), [], r'annotation 100: bbox is \[\], .*not only segmentations'),
    (('annotations', 0, 'bbox', 2), math.nan, 'annotation 100: bbox .*nan'),
    (('annotations', 0, 'bbox', 2), 10 ** 400, 'annotation 100: bbox'),
    (('annotations', 0, 'area'), -1, 'annotation 100: area is -1'),
    (('annotations', 0, 'iscrowd'), 2, 'annotation 100: iscrowd is 2'),
    (('images', 0, 'width'), 65, 'width 65, but .*a.jpg has 64'),
    (('images', 0, 'width'), '64', "image 9: width is '64'"),
    (('images', 0, 'file_name'), '', "image 9: file_name is ''"),
    (('images', 0, 'file_name'), '../export/a.jpg', 'is not inside of the image folder'),
    (('images', 0, 'file_name'), '/etc/passwd', 'is not inside of the image folder'),
    (('images', 0, 'file_name'), 'e.jpg', '1 of its 4 images are missing, such as .*e.jpg'),
    (('images', 0, 'file_name'), '\0', '1 of its 4 images are missing'),
    (('images', 0, 'file_name'), 'a' * 5000, '1 of its 4 images are missing'),
])
def test_invalid_file_is_a_user_error_and_no_list_is_written(export, tmp_path, keys, value,
                                                             message):
    file, folder = export
    content = json.loads(file.read_text())
    *path, last = keys
    target = content
    for key in path:
        target = target[key]
    target[last] = value
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=f'(?s){re.escape(str(file))}.*{message}'):
        write_coco_lists([export], [export], tmp_path / 'lists')
    assert list((tmp_path / 'lists').iterdir()) == []


@pytest.mark.parametrize('content, message', [
    (b'', 'not valid JSON'), (b'\xff', 'not valid JSON'), (b'[' * 100_000, 'not valid JSON'),
    (b'[]', 'not an annotation file'), (None, 'cannot be read')])
def test_file_without_json_is_a_user_error(export, tmp_path, content, message):
    export[0].unlink()
    if content is not None:
        export[0].write_bytes(content)
    with pytest.raises(UserError, match=message):
        write_coco_lists([export], [], tmp_path / 'lists')


def test_exports_are_parsed():
    assert parse_exports(['a.json:b', r'C:\a.json:D:\b', 'x:y.JSON.json:z:z']) == [
        ('a.json', 'b'), (r'C:\a.json', r'D:\b'), ('x:y.JSON.json', 'z:z')]


@pytest.mark.parametrize('parameters, message', [
    ({'coco_train': ('a.json',)}, "'a.json' is not annotations.json:images"),
    ({'coco_test': ('a.json:b',), 'train': ('a:b',)}, 'cannot be combined'),
    ({'coco_test': ('a.json:b',), 'download': 'x'}, 'are for VOC; leave them out'),
    ({'coco_test': ('a.json:b',), 'classes': ('a', 'a')}, 'each class once'),
    ({'coco_test': ('a.json:b',)}, 'a.json cannot be read'),
])
def test_invalid_parameters_are_reported(parameters, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(Parameters(**parameters))
    assert message in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# Evaluation
# --------------------------------------------------------------------------------------------------


def random_box(rng):
    """Return [x, y, width, height] of any area range, perhaps beyond an image of 200 x 150."""
    side = rng.choice([0.7, 10, 30, 60, 130, 190])
    return [round(rng.uniform(-5, 150), 2), round(rng.uniform(-5, 100), 2),
            round(side * rng.uniform(.5, 1.2), 2), round(side * rng.uniform(.5, 1.2), 2)]


@pytest.fixture
def random_case(make_coco, tmp_path, monkeypatch):
    """Random annotations and detections, with crowds: the annotation file and the data folder."""
    rng = random.Random(0)
    image_ids = rng.sample(range(1000), 12)
    annotations = []
    for image_id in image_ids[1:]:
        for _ in range(rng.randrange(8)):
            box = random_box(rng)
            annotations.append(annotate(
                image_id, rng.choice([3, 7]), box, int(rng.random() < 0.2),
                area=box[2] * box[3] * rng.uniform(0.4, 1)))
    export = make_coco({i: f'{i}.png' for i in image_ids}, annotations,
                       [*CATEGORIES, {'id': 5, 'name': 'absent'}], size=(200, 150))
    write_coco_lists([], [export], tmp_path / 'lists')

    found = Detections([], [], [])
    for image_id in image_ids:
        here = [row for row in annotations if row['image_id'] == image_id]
        near = [([value + rng.choice([0, 0, 0, 1, 4]) for value in row['bbox']],
                 {3: 1, 7: 3}[row['category_id']], rng.randrange(20, 100) / 100)     # ties
                for row in here for _ in range(2)]
        # More than 100 of a class are in the last image.
        other = [(random_box(rng), rng.choice([1, 2, 3, 3, 3]), rng.randrange(40) / 100)
                 for _ in range(200 if image_id == image_ids[-1] else 6)]
        boxes, labels, scores = zip(*near, *other)
        boxes = torch.tensor(boxes)
        boxes[:, 2:] += boxes[:, :2]
        found.boxes.append((boxes / torch.tensor([200, 150, 200, 150])).clamp(0, 1))
        found.labels.append(torch.tensor(labels))
        found.scores.append(torch.tensor(scores))
    monkeypatch.setattr(evaluation, 'find_detections', lambda *_: (found, None))
    model = torch.nn.Linear(1, 1)
    model.label_map = read_list(tmp_path / 'lists', 'label_map')
    model.antialias, model.input_size = True, 300
    monkeypatch.setattr(evaluation.SSD300, 'from_checkpoint', lambda path: model)
    return export[0], tmp_path / 'lists'


def run_pycocotools(annotations, results):
    """Evaluate as COCO's own example does: the twelve numbers."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(annotations)
        run = COCOeval(truth, truth.loadRes(str(results)), 'bbox')
        run.evaluate()
        run.accumulate()
        run.summarize()
    return run.stats.tolist()


def test_twelve_numbers_are_those_of_the_original_file(random_case, tmp_path, capsys):
    annotations, lists = random_case
    common = {'data_folder': str(lists), 'device': 'cpu', 'workers': 0}
    results = tmp_path / 'results'
    capsys.readouterr()
    evaluation.main(evaluation.Parameters(**common, results=str(results)))
    table = capsys.readouterr().out.splitlines()[1:]
    assert [path.name for path in results.iterdir()] == ['coco_results.json']
    rows = json.loads((results / 'coco_results.json').read_text())
    assert all(row.keys() == {'image_id', 'category_id', 'bbox', 'score'} for row in rows)

    expected = run_pycocotools(annotations, results / 'coco_results.json')
    label_map = read_list(lists, 'label_map')
    data = read_evaluation(lists, read_list(lists, 'TEST_images'), label_map)
    numbers = coco_summary(read_results(results, data, label_map), data, label_map)
    assert list(numbers) == list(SUMMARY)
    assert list(numbers.values()) == pytest.approx(expected, abs=1e-6)
    assert len(set(expected)) == 12 and min(expected) > 0.05
    lines = [line for line in table if line.startswith('COCO ')]
    assert lines == [f'{f"COCO {name}":18}{value:.4f}' for name, value in zip(SUMMARY, expected)]

    evaluation.main(evaluation.Parameters(**common, detections=str(results)))
    assert capsys.readouterr().out.splitlines() == table


def test_an_object_with_id_0_counts(export, tmp_path):
    content = json.loads(export[0].read_text())
    content['annotations'] = [{**content['annotations'][0], 'id': 0}]
    export[0].write_text(json.dumps(content))
    write_coco_lists([], [export], tmp_path / 'lists')
    dataset = PascalVOCDataset(tmp_path / 'lists', 'TEST')
    data = read_evaluation(tmp_path / 'lists', dataset.images, dataset.label_map)
    found = Detections(
        [torch.tensor(objects['boxes']).view(-1, 4) for objects in dataset.objects],
        [torch.tensor(objects['labels']) for objects in dataset.objects],
        [torch.ones(len(objects['labels'])) for objects in dataset.objects])
    assert coco_summary(found, data, dataset.label_map)['AP 0.5:0.95'] == pytest.approx(1)


def test_an_area_without_objects_has_no_number(export, tmp_path, capsys):
    write_coco_lists([], [export], tmp_path / 'lists')
    (tmp_path / 'coco_results.json').write_text('[]')
    capsys.readouterr()
    evaluation.main(evaluation.Parameters(data_folder=str(tmp_path / 'lists'),
                                          detections=str(tmp_path)))
    out = capsys.readouterr().out
    assert re.search('^COCO AP large +no objects$', out, re.M)
    assert re.search('^COCO AP small +0.0000$', out, re.M)


@pytest.mark.parametrize('row, message', [
    (3, 'image_id None is not'), ({'image_id': 5}, 'image_id 5 is not'),
    ({'category_id': 1}, 'category_id 1 is not'), ({'bbox': [1, 2, 3]}, r'bbox \[1, 2, 3\]'),
    ({'bbox': [1, 2, -1, 3]}, 'bbox'), ({'score': None}, 'score None'),
    ({'score': math.inf}, 'score inf')])
def test_invalid_results_are_a_user_error(export, tmp_path, row, message):
    lists = tmp_path / 'lists'
    write_coco_lists([], [export], lists)
    label_map = read_list(lists, 'label_map')
    data = read_evaluation(lists, read_list(lists, 'TEST_images'), label_map)
    good = {'image_id': 9, 'category_id': 7, 'bbox': [1, 2, 3, 4], 'score': 0.5}
    rows = [good, {**good, **row} if isinstance(row, dict) else row]
    (tmp_path / 'coco_results.json').write_text(json.dumps(rows))
    with pytest.raises(UserError, match=f'coco_results.json, detection 2: .*{message}'):
        read_results(tmp_path, data, label_map)
    (tmp_path / 'coco_results.json').write_text('{}')
    with pytest.raises(UserError, match='not a list of detections'):
        read_results(tmp_path, data, label_map)


def test_coco_file_of_other_lists_is_a_user_error(export, tmp_path):
    lists = tmp_path / 'lists'
    write_coco_lists([], [export], lists)
    images, label_map = read_list(lists, 'TEST_images'), read_list(lists, 'label_map')
    for other in ((images[1:], label_map), (images, {**label_map, 'ant': 3})):
        with pytest.raises(UserError, match='TEST_coco.json has other images or classes'):
            read_evaluation(lists, *other)
