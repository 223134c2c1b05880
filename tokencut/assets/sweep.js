(() => {
  const box = document.getElementById('slider');
  if (!box) return;
  const keeps = box.dataset.keeps.split(','), input = document.getElementById('keep');
  const shown = document.getElementById('shown'), pictures = document.querySelectorAll('[data-keep]');
  const show = () => {
    for (const picture of pictures) picture.hidden = picture.dataset.keep !== input.value;
    shown.textContent = keeps[input.value];
    input.setAttribute('aria-valuetext', 'keep ' + keeps[input.value]);
  };
  box.hidden = false;
  document.body.classList.add('one');
  input.addEventListener('input', show);
  show();
})();
