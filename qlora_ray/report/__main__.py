import sys

from qlora_ray.report.door import main

sys.exit(main())
