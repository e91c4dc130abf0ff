"""What can be asked for: every merge method with its parameters as JSON Schema."""

from fastapi import APIRouter, HTTPException

from app.resolve import parameter_schema
from app.schemas import MethodList, MethodView
from app.views import method_view, post_step_view
from merge_algos import catalogue, post
from merge_algos.errors import UnknownMethod

router = APIRouter(tags=["methods"])


@router.get("/methods")
def list_methods() -> MethodList:
    steps = [post_step_view(name, parameter_schema(step).json_schema()) for name, step in post.registry().items()]
    return MethodList(data=[_view(name) for name in catalogue.registry()], post_steps=steps)


@router.get("/methods/{name}")
def show_method(name: str) -> MethodView:
    try:
        return _view(name)
    except UnknownMethod as error:  # in a recipe it is a wrong field; here it is the address
        raise HTTPException(404, str(error)) from error


def _view(name: str) -> MethodView:
    return method_view(name, parameter_schema(catalogue.find(name)).json_schema())
