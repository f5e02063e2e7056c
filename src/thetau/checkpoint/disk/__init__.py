"""The one layer that writes to a disk: files and folders that are whole or not there, locks, side files, records in JSON.

Everything that thetau keeps goes through here. A temporary stands beside what it becomes, under a fixed name and a lock: `.NAME.part` for a
file, `.NAME.partial` for a folder. A process that dies releases its lock, so the next one to write the same thing knows that what lies
there is nobody's, and clears it. Errors have one wording, see `failure`.
"""

from thetau.checkpoint.disk.documents import check_json as check_json
from thetau.checkpoint.disk.failure import NotConfirmed as NotConfirmed
from thetau.checkpoint.disk.failure import busy as busy
from thetau.checkpoint.disk.failure import failed as failed
from thetau.checkpoint.disk.files import replacing as replacing
from thetau.checkpoint.disk.files import write_bytes as write_bytes
from thetau.checkpoint.disk.files import write_json as write_json
from thetau.checkpoint.disk.files import write_text as write_text
from thetau.checkpoint.disk.folders import Place as Place
from thetau.checkpoint.disk.folders import check_new as check_new
from thetau.checkpoint.disk.folders import new_folder as new_folder
from thetau.checkpoint.disk.folders import remove as remove
from thetau.checkpoint.disk.lines import append_lines as append_lines
from thetau.checkpoint.disk.locks import Held as Held
from thetau.checkpoint.disk.locks import Lock as Lock
from thetau.checkpoint.disk.parents import check_file as check_file
from thetau.checkpoint.disk.parents import check_place as check_place
from thetau.checkpoint.disk.sidefiles import SIDE_FILES as SIDE_FILES
from thetau.checkpoint.disk.sidefiles import copy_side_files as copy_side_files
from thetau.checkpoint.disk.sidefiles import is_side_file as is_side_file
from thetau.checkpoint.disk.syncing import sync as sync
from thetau.checkpoint.disk.syncing import sync_data as sync_data
from thetau.checkpoint.disk.tensors import header as header
from thetau.checkpoint.disk.tensors import write_tensors as write_tensors
