import sys

from qlora_ray.show_data import main

sys.exit(main())
