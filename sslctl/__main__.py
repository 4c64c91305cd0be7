import sys

from sslctl.cli import main

sys.exit(main())
