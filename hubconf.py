"""torch.hub entry points; each has an example."""

from rawaudio.hub import load_named as _load_named
from sashimi.diffwave import named_config as _named_config

dependencies = ["torch", "numpy", "safetensors", "omegaconf"]


def sashimi_ar_sc09(pretrained=True, progress=True, device=None, checkpoint=None):
    """Spoken digits, 16 kHz: the published 4.8M-parameter autoregressive SaShiMi.

    Trained on Speech Commands SC09 (zero to nine, one second each). The weights are those of
    the original simple-sashimi release (MIT licence), downloaded once and cached by torch.hub.

        model = torch.hub.load("OWNER/simple-sashimi", "sashimi_ar_sc09", trust_repo=True)
        audio = model.unconditional_generate(4)     # (4, 16000) float in [-1, 1], 16 kHz
        bits = model.nll(audio) / math.log(2)       # (4,) bits per sample

    Args:
        pretrained: False gives fresh random weights and downloads nothing.
        progress: show the download's progress.
        device: "cpu", "cuda", ...; None is the GPU if there is one.
        checkpoint: path or URL of other weights; a path needs no network, and a URL may end in
            #sha256=DIGITS to be checked.

    Returns a SashimiAR in eval mode. Raises ConnectionError without a network.
    """
    return _load_named("sashimi_ar_sc09", pretrained, progress, device, checkpoint)


def sashimi_ar_digits(pretrained=True, progress=True, device=None, checkpoint=None):
    """Autoregressive SaShiMi that says the digit it is told, 8 kHz; weights travel with the code.

    1.6M parameters; told a digit and a voice, 3.508 bits per sample on the official test set. The
    shipped classifier hears what was told in 85 % of its clips, and in 62 % with at least 90 %
    confidence. Trained on the Free Spoken Digit Dataset (six speakers, CC BY-SA 4.0); the model
    card is sashimi/weights/sashimi_ar_digits.md. Needs no network.

        model = torch.hub.load("OWNER/simple-sashimi", "sashimi_ar_digits", trust_repo=True)
        audio = model.generate(4, label="seven")    # (4, 8000) float in [-1, 1], 8 kHz
        audio = model.unconditional_generate(4)     # told what is drawn at random

    Args:
        pretrained: False gives fresh random weights of the same size.
        progress: unused, nothing is downloaded.
        device: "cpu", "cuda", ...; None is the GPU if there is one.
        checkpoint: path or URL of other weights to load instead.

    Returns a SashimiAR in eval mode.
    """
    return _load_named("sashimi_ar_digits", pretrained, progress, device, checkpoint)


def sashimi_diffwave_sc09(
    pretrained=True, progress=True, device=None, checkpoint=None, config="large"
):
    """Diffusion SaShiMi for spoken digits, 16 kHz: the architecture, for weights of your own.

    Nobody has published weights yet: train them (`python train.py model=diffwave ...`, MIT
    licence), or load the diffusion checkpoints of the original simple-sashimi trainer, its vocoders
    too, or those of the master branch of albertfgu/diffwave-sashimi.

        model = torch.hub.load("OWNER/simple-sashimi", "sashimi_diffwave_sc09", trust_repo=True,
                               checkpoint="runs/run1/best.safetensors")
        audio = model.unconditional_generate(4)             # (4, 16000) float in [-1, 1], 16 kHz
        audio = model.generate_from_latent(torch.randn(4, 16000))     # same latent, same audio

    Args:
        pretrained: False gives fresh random weights and downloads nothing.
        progress: show the download's progress.
        device: "cpu", "cuda", ...; None is the GPU if there is one.
        checkpoint: path or URL of weights.
        config: "large" (23.5M parameters), "small" (7.7M) or "small_unidirectional" (7.5M), of
            fresh weights.

    Returns a SashimiDiffWave in eval mode. Raises CheckpointError, which says what to do, when no
    weights are given.
    """
    config = _named_config(config)
    return _load_named("sashimi_diffwave_sc09", pretrained, progress, device, checkpoint, config)


def sashimi_diffwave_digits(pretrained=True, progress=True, device=None, checkpoint=None):
    """Diffusion SaShiMi that says the digit it is told, 8 kHz; its weights travel with the code.

    1.9M parameters; told a digit and a voice, its error on the official test set is 0.394 of that
    of scaling the input. The shipped classifier hears what was told in 99 % of its clips, and in
    91 % with at least 90 % confidence.
    Trained on the Free Spoken Digit Dataset (six speakers, CC BY-SA 4.0); the model card is
    sashimi/weights/sashimi_diffwave_digits.md. Needs no network.

        model = torch.hub.load("OWNER/simple-sashimi", "sashimi_diffwave_digits", trust_repo=True)
        audio = model.generate(4, label="seven")            # (4, 6000) float in [-1, 1], 8 kHz
        audio = model.generate(2, label=["one", "two"], speaker="theo")     # model.conditions
        audio = model.unconditional_generate(4, steps=20)   # told what is drawn at random
        audio = model.generate_from_latent(torch.randn(4, 6000))      # same latent, same audio

    Args:
        pretrained: False gives fresh random weights of the same size.
        progress: unused, nothing is downloaded.
        device: "cpu", "cuda", ...; None is the GPU if there is one.
        checkpoint: path or URL of other weights to load instead.

    Returns a SashimiDiffWave in eval mode.
    """
    return _load_named("sashimi_diffwave_digits", pretrained, progress, device, checkpoint)


def asgan_digits(pretrained=True, progress=True, device=None, checkpoint=None, vocoder=None):
    """ASGAN that says the digit it is told at once, 8 kHz; its weights travel with the code.

    0.3M parameters: a StyleGAN of mel spectrograms, which Griffin-Lim makes audible. Its FID
    on the official test set is 2.130; the shipped classifier hears what was told in 99.6 % of its
    clips, and in 93.6 % with at least 90 % confidence.
    Trained on the Free Spoken Digit Dataset (six speakers, CC BY-SA 4.0); the model card is
    sashimi/weights/asgan_digits.md. Needs no network.

        model = torch.hub.load("OWNER/simple-sashimi", "asgan_digits", trust_repo=True)
        audio = model.generate(4, label="seven")            # (4, 5120) float in [-1, 1], 8 kHz
        audio = model.generate(2, label=["one", "two"], speaker="theo")     # model.conditions
        audio = model.unconditional_generate(4)             # told what is drawn at random

    Args:
        pretrained: False gives fresh random weights of the same size.
        progress: unused, nothing is downloaded.
        device: "cpu", "cuda", ...; None is the GPU if there is one.
        checkpoint: path or URL of other weights to load instead.
        vocoder: path or URL of the weights of a vocoder of its mel spectrograms, in place of
            Griffin-Lim: of a diffusion model of yours (unconditional=false), or a HiFi-GAN.

    Returns an ASGAN in eval mode.
    """
    return _load_named("asgan_digits", pretrained, progress, device, checkpoint, vocoder=vocoder)


def asgan_hubert_sc09_6(pretrained=True, progress=True, device=None, checkpoint=None, vocoder=None):
    """ASGAN for spoken digits, 16 kHz: the published StyleGAN of HuBERT features, with its vocoder.

    33.4M parameters and 16.4M of the vocoder, trained on Speech Commands SC09. Both files are those
    of the original simple-asgan release (MIT licence), downloaded once and cached by torch.hub; no
    code in them is executed.

        model = torch.hub.load("OWNER/simple-sashimi", "asgan_hubert_sc09_6", trust_repo=True)
        audio = model.unconditional_generate(4)             # (4, 16000) float in [-1, 1], 16 kHz
        w = model.z2w(torch.randn(4, model.z_dim))          # (4, w_dim)
        audio = model.generate_from_w(w)                    # or one w per layer: (4, 16, w_dim)

    Args:
        pretrained: False gives fresh random weights and downloads nothing.
        progress: show the download's progress.
        device: "cpu", "cuda", ...; None is the GPU if there is one.
        checkpoint: path or URL of other weights of the generator.
        vocoder: path or URL of other weights of the vocoder.

    Returns an ASGAN in eval mode. Raises ConnectionError without a network.
    """
    return _load_named(
        "asgan_hubert_sc09_6", pretrained, progress, device, checkpoint, vocoder=vocoder
    )


def wavenet_sc09(pretrained=True, progress=True, device=None, checkpoint=None):
    """WaveNet for spoken digits, 16 kHz: the published baseline of the SaShiMi paper.

    4.2M parameters, autoregressive, trained on Speech Commands SC09. The weights are those of the
    paper's release (state-spaces/s4, Apache-2.0 licence), downloaded once and cached by torch.hub.
    It knows audio that is stretched to full scale: give it such prefixes, and `nll` such clips.

        model = torch.hub.load("OWNER/simple-sashimi", "wavenet_sc09", trust_repo=True)
        audio = model.unconditional_generate(4)     # (4, 16000) float in [-1, 1], 16 kHz
        bits = model.nll(audio) / math.log(2)       # (4,) bits per sample

    Args:
        pretrained: False gives fresh random weights and downloads nothing.
        progress: show the download's progress.
        device: "cpu", "cuda", ...; None is the GPU if there is one.
        checkpoint: path or URL of other weights, those of state-spaces too: wavenet_youtubemix.pt.

    Returns a WaveNet in eval mode. Raises ConnectionError without a network.
    """
    return _load_named("wavenet_sc09", pretrained, progress, device, checkpoint)


def samplernn_sc09(pretrained=True, progress=True, device=None, checkpoint=None):
    """SampleRNN for spoken digits, 16 kHz: the published baseline of the SaShiMi paper.

    35.0M parameters, autoregressive, trained on Speech Commands SC09. The weights are those of the
    paper's release (state-spaces/s4, Apache-2.0 licence), downloaded once and cached by torch.hub.
    It knows audio that is stretched to full scale: give it such prefixes, and `nll` such clips.

        model = torch.hub.load("OWNER/simple-sashimi", "samplernn_sc09", trust_repo=True)
        audio = model.unconditional_generate(4)     # (4, 16000) float in [-1, 1], 16 kHz
        bits = model.nll(audio) / math.log(2)       # (4,) bits per sample

    Args:
        pretrained: False gives fresh random weights and downloads nothing.
        progress: show the download's progress.
        device: "cpu", "cuda", ...; None is the GPU if there is one.
        checkpoint: path or URL of other weights, those of state-spaces too: a file named
            samplernn_beethoven.pt has linear classes.

    Returns a SampleRNN in eval mode. Raises ConnectionError without a network.
    """
    return _load_named("samplernn_sc09", pretrained, progress, device, checkpoint)


def diffwave_sc09(pretrained=True, progress=True, device=None, checkpoint=None):
    """DiffWave for spoken digits, 16 kHz: the published diffusion model of dilated convolutions.

    24.1M parameters, trained on Speech Commands SC09 for a million steps. The weights are those of
    DiffWave-unconditional (MIT licence), as albertfgu/diffwave-sashimi publishes them, downloaded
    once, checked, and cached by torch.hub.

        model = torch.hub.load("OWNER/simple-sashimi", "diffwave_sc09", trust_repo=True)
        audio = model.unconditional_generate(4)             # (4, 16000) float in [-1, 1], 16 kHz
        audio = model.generate_from_latent(torch.randn(4, 16000))     # same latent, same audio

    Args:
        pretrained: False gives fresh random weights and downloads nothing.
        progress: show the download's progress.
        device: "cpu", "cuda", ...; None is the GPU if there is one.
        checkpoint: path or URL of other weights, <iteration>.pkl of diffwave-sashimi too.

    Returns a DiffWave in eval mode. Raises ConnectionError without a network.
    """
    return _load_named("diffwave_sc09", pretrained, progress, device, checkpoint)


def wavegan_sc09(pretrained=True, progress=True, device=None, checkpoint=None):
    """WaveGAN for spoken digits, 16 kHz: the architecture, for weights of your own.

    19.1M parameters, a clip in one pass. Nobody has published weights: train them (`python
    train.py recipe=wavegan-sc09 ...`, MIT licence), or load those of chrisdonahue/wavegan, exported
    as rawaudio/published.py says, or of mostafaelaraby/wavegan-pytorch.

        model = torch.hub.load("OWNER/simple-sashimi", "wavegan_sc09", trust_repo=True,
                               checkpoint="wavegan.npz")
        audio = model.unconditional_generate(4)             # (4, 16000) float in [-1, 1], 16 kHz
        audio = model.generate_from_latent(2 * torch.rand(4, 100) - 1)    # same latent, same audio

    Args:
        pretrained: False gives fresh random weights and downloads nothing.
        progress: show the download's progress.
        device: "cpu", "cuda", ...; None is the GPU if there is one.
        checkpoint: path or URL of weights.

    Returns a WaveGAN in eval mode. Raises CheckpointError, which says what to do, when no weights
    are given.
    """
    return _load_named("wavegan_sc09", pretrained, progress, device, checkpoint)
