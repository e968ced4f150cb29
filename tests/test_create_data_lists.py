"""The command line of create_data_lists.py, and its download with tiny archives in VOC's place."""

import hashlib
import json
import shutil

import pytest
from torchvision.datasets import utils, voc

from create_data_lists import Parameters, main
from utils import label_map as voc_label_map


def run(capsys=None, **parameters):
    """Run main; with capsys expect a slip, and return its line."""
    if capsys is None:
        main(Parameters(**parameters))
        return None
    with pytest.raises(SystemExit) as stop:
        main(Parameters(**parameters))
    assert stop.value.code == 1
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.fixture
def archives(make_voc, tmp_path, monkeypatch):
    """torchvision's table of VOC, with addresses and checksums of archives of one image each."""
    table = {}
    for key, year, split, name in (('2007', 2007, 'trainval', 'dog'),
                                   ('2007-test', 2007, 'test', 'cat'),
                                   ('2012', 2012, 'trainval', 'sofa')):
        make_voc({split: {f'{key}_a': [(name, (1, 1, 30, 30))]}}, name=f'{key}/VOCdevkit/VOC{year}')
        file = shutil.make_archive(tmp_path / f'VOC{key}', 'tar', tmp_path / key)
        md5 = hashlib.md5((tmp_path / f'VOC{key}.tar').read_bytes()).hexdigest()
        table[key] = {**voc.DATASET_YEAR_DICT[key], 'url': f'file://{file}', 'md5': md5}
    monkeypatch.setattr(voc, 'DATASET_YEAR_DICT', table)
    # What stands in for the network; checksums and unpacking stay torchvision's.
    monkeypatch.setattr(utils, '_urlretrieve', lambda url, filename, **_: shutil.copy(
        url.removeprefix('file://'), filename))
    return table


def read(folder, name):
    return json.loads((folder / f'{name}.json').read_text())


def test_download_brings_voc_with_its_twenty_classes(archives, tmp_path):
    for _ in range(2):  # the second time nothing is downloaded
        run(download=str(tmp_path / 'new'), output_folder=str(tmp_path / 'lists'))
    assert len(read(tmp_path / 'lists', 'TRAIN_images')) == 2
    assert len(read(tmp_path / 'lists', 'TEST_images')) == 1
    assert read(tmp_path / 'lists', 'label_map') == voc_label_map
    labels = [objects['labels'] for objects in read(tmp_path / 'lists', 'TRAIN_objects')]
    assert labels == [[voc_label_map['dog']], [voc_label_map['sofa']]]


@pytest.mark.parametrize('entry', [{'md5': '0' * 32}, {'url': 'file:///nowhere/VOC.tar'}])
def test_download_that_fails_is_a_slip(archives, tmp_path, capsys, entry):
    archives['2012'].update(entry)
    line = run(capsys, download=str(tmp_path / 'new'), output_folder=str(tmp_path / 'lists'))
    assert 'VOC2012 trainval could not be downloaded' in line and '--voc12-path' in line
    assert not (tmp_path / 'lists').exists()


def test_voc_folders_have_the_twenty_classes(make_voc, tmp_path, capsys):
    voc07 = make_voc({'trainval': {'a': [('dog', (1, 1, 9, 9))]}, 'test': {'b': []}}, name='07')
    voc12 = make_voc({'trainval': {'c': [('unicorn', (1, 1, 9, 9))]}}, name='12')
    paths = {'voc07_path': str(voc07), 'voc12_path': str(voc12),
             'output_folder': str(tmp_path / 'lists')}
    assert "class 'unicorn' is none of" in run(capsys, **paths)
    (voc12 / 'Annotations' / 'c.xml').write_text('<annotation/>')
    run(**paths)
    assert read(tmp_path / 'lists', 'label_map') == voc_label_map


def test_own_data_takes_any_number_of_splits_and_its_own_classes(make_voc, tmp_path, capsys):
    a = make_voc({'s': {'a': [('cat', (1, 1, 9, 9))]}, 't': {'b': [('ant', (1, 1, 9, 9))]}}, 'a')
    b = make_voc({'s': {'c': [('dog', (1, 1, 9, 9))]}}, 'b:colon')
    run(train=(f'{a}:s', f'{b}:s'), test=(f'{a}:t',), output_folder=str(tmp_path / 'lists'))
    assert len(read(tmp_path / 'lists', 'TRAIN_images')) == 2
    assert list(read(tmp_path / 'lists', 'label_map')) == ['background', 'ant', 'cat', 'dog']

    run(train=(f'{a}:s',), classes=('zebra', 'cat'), output_folder=str(tmp_path / 'given'))
    assert read(tmp_path / 'given', 'label_map') == {'background': 0, 'zebra': 1, 'cat': 2}
    line = run(capsys, train=(f'{b}:s',), classes=('cat',), output_folder=str(tmp_path / 'no'))
    assert "class 'dog' is none of" in line and str(b) in line


@pytest.mark.parametrize('parameters, words', [
    ({'train': ('nosplit',)}, "'nosplit' is not folder:split"),
    ({'train': (':split',)}, "':split' is not folder:split"),
    ({'train': ('a:b',), 'download': 'x'}, '--download is for VOC'),
    ({'train': ('a:b',), 'classes': ('cat', 'cat')}, 'each class once'),
    ({'train': ('a:b',), 'classes': ('background',)}, 'background is none of them'),
])
def test_slips_in_the_parameters(parameters, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words in run(capsys, **parameters)
    assert list(tmp_path.iterdir()) == []
