from .episodes import EpisodeSampler
from .errors import DataError
from .glyphs import glyphs
from .images import ImageClasses
from .nearest_neighbour import pixel_nearest_neighbour
