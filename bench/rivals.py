"""The peers of bench/peers.py.

Lightly...  modules as the package's examples and its CIFAR-10 benchmark put them together; imported where it is used
Plain...    modules as methods are commonly written in one file, with torchvision's transforms
            all: model(views) -> loss;  model.backbone;  model.transform(PIL image) -> views
Peer        one of them with its optimiser, its DataLoader and its step
"""

import copy
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T

import common
import moco

SIZE = 32


def bn_groups(batch_size):
    """MoCo's BatchNorm groups of both sides: lightly's are of equal size."""
    return math.gcd(moco.bn_groups(None, batch_size), batch_size)


def lightly_views(mean, std):
    """SimCLR's and MoCo's: half the jitter and no blur are what its documentation and its benchmark say of CIFAR."""
    from lightly.transforms import SimCLRTransform
    return SimCLRTransform(input_size=SIZE, cj_strength=0.5, gaussian_blur=0.0, normalize=dict(mean=mean, std=std))


class LightlySimCLR(nn.Module):
    def __init__(self, backbone, recipe, batch_size, mean, std):
        super().__init__()
        from lightly.loss import NTXentLoss
        from lightly.models.modules import SimCLRProjectionHead
        self.transform = lightly_views(mean, std)
        self.backbone, self.criterion = backbone, NTXentLoss(recipe["temperature"])
        self.head = SimCLRProjectionHead(backbone.dim, backbone.dim, 128)

    def forward(self, views):
        z0, z1 = (self.head(self.backbone(x)) for x in views)
        return self.criterion(z0, z1)


class LightlyMoCo(nn.Module):
    def __init__(self, backbone, recipe, batch_size, mean, std):
        super().__init__()
        from lightly.loss import NTXentLoss
        from lightly.models import utils
        from lightly.models.modules import MoCoProjectionHead
        # One view asks the other, as in its example and in moco.py; its benchmark has both directions.
        self.utils, self.m, self.transform = utils, recipe["momentum_encoder"], lightly_views(mean, std)
        self.backbone, self.head = backbone, MoCoProjectionHead(backbone.dim, backbone.dim, 128)
        self.split(backbone, bn_groups(batch_size))
        self.key_backbone, self.key_head = copy.deepcopy(self.backbone), copy.deepcopy(self.head)
        for module in (self.key_backbone, self.key_head):
            utils.deactivate_requires_grad(module)
        self.criterion = NTXentLoss(recipe["temperature"], memory_bank_size=(recipe["queue_size"], 128))

    def split(self, module, groups):
        from lightly.models.batchnorm import SplitBatchNorm
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, SplitBatchNorm(child.num_features, groups))
            else:
                self.split(child, groups)

    def forward(self, views):
        self.utils.update_momentum(self.backbone, self.key_backbone, self.m)
        self.utils.update_momentum(self.head, self.key_head, self.m)
        query = self.head(self.backbone(views[0]))
        with torch.no_grad():
            x, order = self.utils.batch_shuffle(views[1])
            key = self.utils.batch_unshuffle(self.key_head(self.key_backbone(x)), order)
        return self.criterion(query, key)


class LightlySimSiam(nn.Module):
    def __init__(self, backbone, recipe, batch_size, mean, std):
        super().__init__()
        from lightly.loss import NegativeCosineSimilarity
        from lightly.models.modules.heads import ProjectionHead, SimSiamPredictionHead
        from lightly.transforms import SimSiamTransform
        self.transform = SimSiamTransform(input_size=SIZE, gaussian_blur=0.0, normalize=dict(mean=mean, std=std))
        self.backbone, self.criterion = backbone, NegativeCosineSimilarity()
        # Two layers, as its CIFAR-10 benchmark has; SimSiamProjectionHead is the three of ImageNet.
        self.head = ProjectionHead([(backbone.dim, 2048, nn.BatchNorm1d(2048), nn.ReLU(inplace=True)),
                                    (2048, 2048, nn.BatchNorm1d(2048), None)])
        self.predictor = SimSiamPredictionHead(2048, 512, 2048)

    def forward(self, views):
        z0, z1 = (self.head(self.backbone(x)) for x in views)
        p0, p1 = self.predictor(z0), self.predictor(z1)
        return (self.criterion(z0.detach(), p1) + self.criterion(z1.detach(), p0)) / 2


class PlainSimCLR(nn.Module):
    """A widely used single file, dkobak's simclr-cifar10: crops from 0.2, grey 0.1, a head of 1024, views one by one.

    It does not normalise pixels; here they are, so that both sides are evaluated alike.
    """

    def __init__(self, backbone, recipe, batch_size, mean, std):
        super().__init__()
        self.view = T.Compose([T.RandomResizedCrop(SIZE, scale=(0.2, 1.0)), T.RandomHorizontalFlip(),
                               T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8), T.RandomGrayscale(p=0.1),
                               T.ToTensor(), T.Normalize(mean, std)])
        self.backbone, self.temperature = backbone, recipe["temperature"]
        self.head = nn.Sequential(nn.Linear(backbone.dim, 1024), nn.ReLU(), nn.Linear(1024, 128))

    def transform(self, image):
        return self.view(image), self.view(image)

    def forward(self, views):
        z = F.normalize(torch.cat([self.head(self.backbone(x)) for x in views]), dim=1)      # (2N, 128)
        s = (z @ z.T / self.temperature).masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), -torch.inf)
        return F.cross_entropy(s, torch.arange(len(z), device=z.device).roll(len(z) // 2))


class PlainRotNet(nn.Module):
    def __init__(self, backbone, recipe, batch_size, mean, std):
        super().__init__()
        self.upright = T.Compose([T.RandomCrop(SIZE, padding=4), T.RandomHorizontalFlip(), T.ToTensor(),
                                  T.Normalize(mean, std)])
        self.backbone, self.head = backbone, nn.Linear(backbone.dim, 4)

    def transform(self, image):
        x = self.upright(image)
        return [x.rot90(k, (1, 2)) for k in range(4)]                              # 4 x (3, S, S)

    @staticmethod
    def inputs(views):
        """4 x (N, 3, S, S) -> (4N, 3, S, S) and the rotations' classes (4N,)."""
        return torch.cat(views), torch.arange(4, device=views[0].device).repeat_interleave(len(views[0]))

    def forward(self, views):
        x4, y4 = self.inputs(views)
        return F.cross_entropy(self.head(self.backbone(x4)), y4)


PEERS = {"simclr-lightly": LightlySimCLR, "moco-lightly": LightlyMoCo, "simsiam-lightly": LightlySimSiam,
         "simclr-plain": PlainSimCLR, "rotnet-plain": PlainRotNet}


class Pictures(Dataset):
    """PIL images from memory, as torchvision's CIFAR10 gives them."""

    def __init__(self, split, transform):
        self.images, self.transform = split.images.permute(0, 2, 3, 1).contiguous().numpy(), transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.images[i]))


class Peer:
    """A peer with its optimiser and its loader.

    backbone, recipe, args, amp   of both sides.  dataset: pictures.Dataset.  layout: the memory format of the network.
    """

    def __init__(self, pair, backbone, recipe, args, dataset, device, amp, layout=torch.preserve_format):
        self.args, self.device = args, device
        self.model = PEERS[pair](backbone, recipe, args.batch_size, dataset.mean, dataset.std)
        self.model.to(device, memory_format=layout).train()
        self.lr, self.autocast = recipe["lr"] * args.batch_size / 256, common.pick_precision(amp, device)[0]
        self.optimizer = torch.optim.SGD([p for p in self.model.parameters() if p.requires_grad], self.lr, momentum=0.9,
                                         weight_decay=recipe["weight_decay"], nesterov=pair.startswith("rotnet"))
        self.pictures = Pictures(dataset.train, self.model.transform)

    def loader(self, **order):
        return DataLoader(self.pictures, self.args.batch_size, drop_last=True, num_workers=self.args.workers,
                          pin_memory=self.device.type == "cuda", **order)

    def step(self, views):
        views = [x.to(self.device, non_blocking=True) for x in views]
        with self.autocast():
            loss = self.model(views)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def tensors(self):
        # Not state_dict(), which leaves out lightly's memory bank.
        return dict([*self.model.named_parameters(), *self.model.named_buffers()])

    def backbone_weights(self):
        """Those of a ResNet18: lightly's SplitBatchNorm has statistics of each group, of which the mean counts."""
        state, plain = self.model.backbone.state_dict(), common.ResNet18(width=self.args.width).state_dict()
        return {name: state[name].view(-1, *x.shape).mean(dim=0) if state[name].numel() != x.numel() else state[name]
                for name, x in plain.items()}
