"""python -m qlora_ray.report: the door is report/door.py."""

import sys

from qlora_ray.report.door import main

sys.exit(main())
