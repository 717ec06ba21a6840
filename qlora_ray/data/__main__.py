"""python -m qlora_ray.data: the door is show_data.py."""

import sys

from qlora_ray.show_data import main

sys.exit(main())
