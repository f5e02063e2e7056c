"""One HTML file of a merged model, a suite's run, a bank or a doctor's result: for people, offline, with nothing in it that could do harm."""

from thetau.report.blocks import Page as Page
from thetau.report.doctors import doctor_page as doctor_page
from thetau.report.render import LIMIT as LIMIT
from thetau.report.render import REPORT as REPORT
from thetau.report.render import check as check
from thetau.report.render import render as render
from thetau.report.render import write as write
from thetau.report.subject import kind_of as kind_of
from thetau.report.subject import page_of as page_of
