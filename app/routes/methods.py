"""What can be asked for: every merge method with its parameters as JSON Schema."""

from fastapi import APIRouter

from app.resolve import parameter_schema
from app.schemas import MethodList, MethodView
from app.views import method_view
from merge_algos import methods

router = APIRouter(tags=["methods"])


@router.get("/methods")
def list_methods() -> MethodList:
    return MethodList(data=[_view(name) for name in methods.registry()])


@router.get("/methods/{name}")
def show_method(name: str) -> MethodView:
    return _view(name)


def _view(name: str) -> MethodView:
    return method_view(name, parameter_schema(name).json_schema())
